"""`python -m benchmarks fit`: the constants of seqkernels/backends/measured.py, from the rows of a GPU.

Every layer is predicted once by constants that were fitted without its rows, and what that leaves is printed: how far
the predictions are off, and what the path costs that they would choose, beside the best one that was measured.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from benchmarks import InputError, record, require
from benchmarks.problems import operator_cell
from benchmarks.record import Row, newest, read, step_key

T = TypeVar("T")

FOLDS = 8
SHORT = 50  # steps: of problems with no more, the host decides
LONG = 500  # steps of problems whose time is that of their steps
TABLE = record.ROOT / "seqkernels" / "backends" / "measured.py"
HEAD = '''"""Constants of what a step costs, by GPU and kernel: microseconds, to multiply the backends' terms by.

Written by `python -m benchmarks fit` from the rows in benchmarks/results; not to be changed by hand.
"""

'''


class Sample(NamedTuple):
    """A measured step and what its cost consists of."""

    layer: tuple  # whose rows are held out together
    terms: Any  # seqkernels.backends.costs.Terms
    us: float


Constants = dict[str, tuple[float, ...]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=Path, default=record.RESULTS, metavar="DIR", help="where the rows are (benchmarks/results)"
    )
    parser.add_argument("--gpu", default="NVIDIA H200", metavar="NAME", help="whose rows (%(default)s)")
    parser.add_argument(
        "--write", action="store_true", help=f"write the constants into {TABLE.relative_to(record.ROOT)}"
    )


def run(options: argparse.Namespace) -> int:
    require("seqkernels")
    rows = [row for row in newest(read(options.rows / "steps.jsonl"), step_key) if row["gpu"] == options.gpu]
    if not rows:
        raise InputError(f"steps.jsonl has no row of {options.gpu}: `python -m benchmarks steps` measures them.")
    whole = [row for row in newest(read(options.rows / "kernels.jsonl")) if row["gpu"] == options.gpu]
    samples = [sample for sample in map(sample_of, rows) if sample]
    print(f"{len(samples)} of {len(rows)} rows of {options.gpu}; the others are of launches that are planned no more")
    small = [sample for row in whole if (sample := long_sample(row, rows[0]["gpu_facts"]))]
    say_residuals(samples, small)
    constants = fitted(samples + small)
    constants |= of_calls(whole, constants, rows[0]["gpu_facts"])
    if options.write:
        write(TABLE, options.gpu, constants)
        print(f"Constants: {TABLE}")
    return 0


# ---- what was measured, in terms of the backends


def gpu_of(name: str, facts: Row):
    gpu = require("seqkernels.hardware").GPU
    return gpu(name, facts["target"], facts["shared_memory"], facts["multiprocessors"], None, tuple(facts["clusters"]))


def call_of(row: Row, **more):
    """The call of a row, of a step or of a module."""
    torch = require("torch")
    cell = operator_cell(row["cell"])
    dtype = getattr(torch, row["dtype"].replace("tf32", "float32"))
    sizes = {"hidden_size": row["H"], "sequences": row["B"], "directions": row.get("directions", 1)}
    tf32 = row["dtype"] == "tf32"
    return require("seqkernels.backends.call").Call(cell, "cuda", dtype, tf32=tf32, **sizes, **more)


def sample_of(row: Row) -> Sample | None:
    """None: its launch is planned no more, or nobody says what it costs."""
    call, gpu, backward = call_of(row), gpu_of(row["gpu"], row["gpu_facts"]), row["pass"] == "backward"
    if row["contender"] == "cudnn":
        terms = require("seqkernels.backends.cudnn").terms(call, gpu, backward)
    elif row["contender"] == "cuda":
        launch = require("seqkernels.backends.cuda.launch")
        same = [
            found
            for found in launch.candidates(call, gpu, backward)
            if not found["reason"] and all(found[name] == row[name] for name in ("path", "units", "tile"))
        ]
        if not same:
            return None
        terms = launch.terms(same[0], call, gpu, backward)
    else:
        return None
    layer = tuple(row[name] for name in ("cell", "dtype", "H", "B", "directions"))
    return Sample(layer, terms, row["us"])


def long_sample(row: Row, facts: Row) -> Sample | None:
    """A step of cuDNN's persistent kernels, from a whole module of many steps."""
    if (row["contender"], row["layout"], row["mode"]) != ("torch.nn", "padded", "infer") or row["T"] < LONG:
        return None
    call = call_of(row, input_size=row["I"], layers=row["layers"])
    terms = require("seqkernels.backends.cudnn").terms(call, gpu_of(row["gpu"], facts), False)
    if "PERSIST" not in terms.key:
        return None
    return Sample((row["problem"], row["cell"], row["dtype"]), terms, row["median_ms"] * 1e3 / row["T"])


# ---- the fit


def fitted(samples: Iterable[Sample]) -> Constants:
    """Of each kernel the constants, none below zero, of the least sum of squared relative errors."""
    constants = {}
    for key, group in grouped(samples, lambda sample: sample.terms.key):
        terms, us = np.array([sample.terms.terms for sample in group]), np.array([sample.us for sample in group])
        known = np.array([sample.terms.known for sample in group])
        constants[key] = tuple(round(float(x), 4) for x in least_squares(terms / us[:, None], (us - known) / us))
    return constants


def least_squares(terms: np.ndarray, wanted: np.ndarray, rounds: int = 2000) -> np.ndarray:
    """argmin |terms x - wanted| with x >= 0, one coordinate after the other."""
    found, gram, right = np.zeros(terms.shape[1]), terms.T @ terms, terms.T @ wanted
    for _ in range(rounds):
        for i in range(len(found)):
            if gram[i, i]:
                found[i] = max(0.0, found[i] - (gram[i] @ found - right[i]) / gram[i, i])
    return found


def grouped(items: Iterable[T], of: Callable[[T], object]) -> list[tuple[str, list[T]]]:
    return [(str(name), list(group)) for name, group in itertools.groupby(sorted(items, key=lambda x: str(of(x))), of)]


# ---- held out


def held_out(samples: list[Sample], more: list[Sample]) -> list[tuple[Sample, float]]:
    """Each sample with its prediction by the others' constants, without all rows of its layer."""
    layers = sorted({sample.layer for sample in samples}, key=str)
    pairs = []
    for fold in range(FOLDS):
        out = set(layers[fold::FOLDS])
        constants = fitted([sample for sample in samples if sample.layer not in out] + more)
        pairs += [(sample, sample.terms.us(constants[sample.terms.key])) for sample in samples if sample.layer in out]
    return pairs


def say_residuals(samples: list[Sample], more: list[Sample]) -> None:
    pairs = held_out(samples, more)
    print("held out: relative error of the predictions, median and greatest")
    for key, group in grouped(pairs, lambda pair: pair[0].terms.key):
        errors = [abs(us / sample.us - 1) for sample, us in group]
        print(f"  {key:40} {len(errors):4} rows  {statistics.median(errors):6.1%}  {max(errors):6.1%}")
    lost = regrets(pairs)
    mean = math.exp(statistics.fmean(map(math.log, lost)))
    print(
        f"held out: the chosen path beside the best one, forward and backward of {len(lost) // 2} layers: "
        f"{mean:.3f} times as long in the mean, {max(lost):.3f} at most"
    )


def regrets(pairs: list[tuple[Sample, float]]) -> list[float]:
    """How many times as long as the best what the predictions choose took, of each layer and pass."""
    found = []
    for _, group in grouped(pairs, lambda pair: (*pair[0].layer, pair[0].terms.key.split()[-1])):
        chosen = min(group, key=lambda pair: pair[1])[0]
        found.append(chosen.us / min(sample.us for sample, _ in group))
    return found


# ---- what the host takes


def of_calls(whole: list[Row], constants: Constants, facts: Row) -> Constants:
    """Of each backend what remains of short problems without their steps: the median."""
    costs = require("seqkernels.backends.costs")
    remain: dict[str, list[float]] = {}
    for row in whole:
        backend = {"torch.nn": "cudnn", "seqkernels": "cuda"}.get(row["contender"])
        if backend and row["T"] <= SHORT and row["layout"] == "padded":
            call = call_of(row, input_size=row["I"], training=row["mode"] == "train")
            steps = steps_of(backend, call, gpu_of(row["gpu"], facts), constants)
            remain.setdefault(costs.call_key(backend, call), []).append(row["median_ms"] * 1e3 - row["T"] * steps)
    return {key: (round(max(0.0, statistics.median(us)), 1),) for key, us in sorted(remain.items())}


def steps_of(backend: str, call, gpu, constants: Constants) -> float:
    """Microseconds of a step through one layer, by the cheapest path."""

    def cost(terms) -> float:
        return terms.us(constants[terms.key])

    passes, launch = ((False, True) if call.training else (False,)), require("seqkernels.backends.cuda.launch")
    if backend == "cudnn":
        return sum(cost(require("seqkernels.backends.cudnn").terms(call, gpu, backward)) for backward in passes)
    return sum(
        min(cost(launch.terms(f, call, gpu, back)) for f in launch.candidates(call, gpu, back) if not f["reason"])
        for back in passes
    )


def write(path: Path, gpu: str, constants: Constants) -> None:
    """Replace what stands for the GPU, and leave the others."""
    table = {**require("seqkernels.backends.measured").MEASURED, gpu: dict(sorted(constants.items()))}
    lines = ["MEASURED: dict[str, dict[str, tuple[float, ...]]] = {"]
    for name, of_gpu in sorted(table.items()):
        lines.append(f'    "{name}": {{')
        for key, values in of_gpu.items():
            numbers = ", ".join(map(str, values)) + ("," if len(values) == 1 else "")
            lines.append(f'        "{key}": ({numbers}),')
        lines.append("    },")
    path.write_text(HEAD + "\n".join([*lines, "}", ""]), encoding="utf-8")
