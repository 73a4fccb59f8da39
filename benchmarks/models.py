"""`python -m benchmarks models`: other people's models, swapped and not; `make test-models` installs them."""

import argparse
import copy
import importlib
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import record, require
from benchmarks.contenders import OURS, OWN
from benchmarks.options import add_out, round_count, thread_count
from benchmarks.record import Row, newest
from benchmarks.timing import paired, speedup, summary, timed
from benchmarks.zoo import ZOO, Entry, loss_of, outputs

MODES = ("infer", "train")


class Contender:
    """One form of a model, as `paired` asks it."""

    round_seconds, rest_seconds = 0.2, 0.0

    def __init__(self, name: str, run: Callable[[], Any]) -> None:
        self.name, self.run = name, run

    def request(self, wanted: int) -> list[float]:
        return [timed(self.run) for _ in range(wanted)]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", default=list(ZOO), choices=list(ZOO), metavar="NAME", help=", ".join(ZOO))
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES, metavar="NAME", help=", ".join(MODES))
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=round_count, default=9, metavar="N", help="of both forms (%(default)s)")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every model whose package is here; 1 if a swapped one gave something else."""
    torch.set_num_threads(options.threads)
    file, started, failed = options.out / "models.jsonl", record.environment()["time"], False
    for name, mode in itertools.product(options.model, options.mode):
        entry = ZOO[name]
        try:
            importlib.import_module(entry.package)
        except ImportError as error:
            print(f"{name}: skipped, {error}")
            continue
        rows = measure(entry, mode, options.rounds)
        common = {"benchmark": "models", "run": started, **record.environment(), "problem": name, "mode": mode}
        common |= {"dtype": "float32", "device": "cpu", "package": version_of(entry.package)}
        record.append(file, *(common | row for row in rows))
        failed |= not rows[0]["right"]
        print(f"{name:32}{mode:6}", "  ".join(said(row) for row in rows), flush=True)
    print(f"Rows: {file}")
    return int(failed)


def version_of(package: str) -> str:
    distributions = importlib.metadata.packages_distributions()[package]
    return f"{distributions[0]} {importlib.metadata.version(distributions[0])}"


def measure(entry: Entry, mode: str, rounds: int) -> list[dict[str, Any]]:
    """A row for either form; no times of one that gives something else."""
    torch.manual_seed(0)
    model, call = entry.build()
    forms = {OWN: model.eval(), OURS: copy.deepcopy(model)}
    report = require("seqkernels").swap_in(forms[OURS], cells=True)
    results = []
    for form in forms.values():
        torch.manual_seed(1)  # some models drop out in inference as well
        with torch.no_grad():
            results.append(outputs(call(form)))
    right = all((y - x).abs().max() <= 1e-4 * x.abs().max() for x, y in zip(*results, strict=True))
    rows = {name: {"contender": name, "right": right, "swapped": len(report.swapped)} for name in forms}
    if right:
        runs = [Contender(name, run_of(form.train(mode == "train"), call, mode)) for name, form in forms.items()]
        times = paired(runs, rounds)
        for name, row in rows.items():
            row |= summary(times[name])
        rows[OWN] |= speedup(times[OWN], times[OURS])
    return list(rows.values())


def run_of(model: torch.nn.Module, call: Callable, mode: str) -> Callable[[], Any]:
    """A call of the model, and in training a backward pass."""

    def infer() -> None:
        with torch.no_grad():
            call(model)

    def train() -> None:
        model.zero_grad()
        loss_of(call(model)).backward()

    return infer if mode == "infer" else train


def said(row: Row) -> str:
    if not row["right"]:
        return f"{row['contender']} WRONG"
    faster = f" (ours {row['speedup']:.2f} times as fast)" if "speedup" in row else ""
    return f"{row['contender']} {row['median_ms']:.1f} ms{faster}"


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for a number of threads and a processor each."""
    rows = newest(row for row in rows if row["right"])
    for cpu, threads in dict.fromkeys((row["cpu"], row["threads"]) for row in rows):
        found = {
            (row["problem"], row["mode"], row["contender"]): row
            for row in rows
            if (row["cpu"], row["threads"]) == (cpu, threads)
        }
        lines = []
        for name in dict.fromkeys(problem for problem, _, _ in found):
            texts = [name, str(next(row["swapped"] for row in found.values() if row["problem"] == name))]
            for mode in MODES:
                own, ours = (found.get((name, mode, contender)) for contender in (OWN, OURS))
                if own and ours:
                    texts += [*(f"{row['median_ms']:.1f}" for row in (own, ours)), f"{own['speedup']:.2f}"]
                else:
                    texts += ["-"] * 3
            lines.append(texts)
        headings = [
            "",
            "swapped",
            *(f"{mode}, {what}" for mode in MODES for what in ("torch.nn ms", "ours ms", "times")),
        ]
        yield (
            f"Other people's models, float32, {cpu}, threads: {threads}",
            headings,
            lines,
            ["Medians of the whole model; times: how many times as fast it is swapped, the median over the rounds."],
        )
