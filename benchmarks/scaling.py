"""`python -m benchmarks scaling`: how cost grows with T, B, H, layers, threads and raggedness."""

import argparse
import math
from typing import Any, NamedTuple

import torch

from benchmarks import InputError, kernels, record
from benchmarks.cases import CASES, Case
from benchmarks.contenders import OURS, OWN
from benchmarks.options import add_out, round_count, thread_count
from benchmarks.problems import CELLS, Problem
from benchmarks.timing import Worker, stopping


class Axis(NamedTuple):
    """One size that grows while the others stay as they are in `CENTRE`."""

    what: str
    values: tuple[float, ...]


CENTRE = Problem(100, 32, 128, 128)
AXES = {
    "T": Axis("steps", (10, 30, 100, 300, 1000)),
    "B": Axis("sequences", (1, 4, 16, 64, 256)),
    "H": Axis("hidden units", (32, 64, 100, 128, 129, 192, 256, 257, 512)),
    "layers": Axis("layers", (1, 2, 3, 4)),
    "threads": Axis("threads", ()),  # 1, 2, 4, ... of those there are
    "raggedness": Axis("share of a padded batch that is padding", (0.0, 0.125, 0.25, 0.375, 0.5)),
}
CONTENDERS = (OWN, OURS)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--axis", nargs="+", choices=list(AXES), default=list(AXES), metavar="NAME", help=", ".join(AXES)
    )
    parser.add_argument("--cell", choices=CELLS, default="GRU")
    parser.add_argument("--mode", choices=CASES["mode"], default="train")
    parser.add_argument("--dtype", choices=CASES["dtype"], default="float32")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=round_count, default=5, metavar="N", help="of both sides (%(default)s)")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """Measure along each axis, print times and slopes, append rows."""
    started = record.environment()["time"]
    for axis in options.axis:
        print(f"{axis} ({AXES[axis].what}), {options.cell}, {options.mode}, {options.dtype}; us a step:")
        rows = []
        for value in values_of(axis, options.threads):
            rows += measure(axis, value, options)
            ours, own = rows[-1], rows[-2]
            print(
                f"  {axis} = {value:<6g} torch.nn {own['step_us']:9.2f}   seqkernels {ours['step_us']:9.2f}", flush=True
            )
        for name in CONTENDERS:
            print(f"  {name}: {slope([row for row in rows if row['contender'] == name], axis)}")
        common = {"benchmark": "scaling", "run": started}
        record.append(options.out / "scaling.jsonl", *(common | row for row in rows))
    print(f"Rows: {options.out / 'scaling.jsonl'}")
    return 0


def values_of(axis: str, threads: int) -> tuple[float, ...]:
    if axis != "threads":
        return AXES[axis].values
    return tuple(sorted({2**k for k in range(threads.bit_length())} | {threads}))


def measure(axis: str, value: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender at one value of the axis."""
    problem, layout, threads = CENTRE, "padded", options.threads
    if axis == "threads":
        threads = int(value)
    elif axis == "raggedness":
        layout = "packed"
        problem = problem._replace(shortest=1 - 2 * value)  # lengths are spread evenly from there to T
    else:
        problem = Problem(**{**problem._asdict(), axis: int(value)})
    case = Case("scaling", options.cell, options.mode, layout, options.dtype, threads, "cpu", problem)
    with stopping([Worker(name, threads) for name in CONTENDERS]) as workers:
        rows = kernels.measure(case, workers, options.rounds)
    if not rows[0]["right"]:
        raise InputError(
            f"{axis} = {value:g}: wrong results are not timed; relative errors {kernels.said_errors(rows)}"
        )
    shared = {"axis": axis, "value": value, **kernels.facts(case)}
    return [{**shared, **row, "step_us": row["median_ms"] * 1e3 / problem.T} for row in rows]


def slope(rows: list[dict[str, Any]], axis: str) -> str:
    """How the time grows: along T a line through the times, along sizes the power that they follow."""
    x = [row["value"] for row in rows]
    y = [row["median_ms"] * 1e3 for row in rows]
    if len(rows) < 2:
        return "one value has no slope"
    if axis in ("T", "layers"):
        b, a = fitted(x, y)
        return f"{b:.2f} us for each of the {AXES[axis].what}, {a:+.0f} us for the call"
    if axis == "raggedness":
        b, a = fitted(x, y)
        return f"{-b / a:.2f} of the time falls away with the padding (1 would be all of it)"
    power, _ = fitted(list(map(math.log, x)), list(map(math.log, y)))
    return f"time grows as {axis} ** {power:.2f}"


def fitted(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the line with the least relative squares: small values count as much as large ones."""
    weights = [1 / max(abs(value), 1e-9) ** 2 for value in y]
    total = sum(weights)
    mean_x = sum(w * v for w, v in zip(weights, x, strict=True)) / total
    mean_y = sum(w * v for w, v in zip(weights, y, strict=True)) / total
    spread = sum(w * (v - mean_x) ** 2 for w, v in zip(weights, x, strict=True))
    b = sum(w * (u - mean_x) * (v - mean_y) for w, u, v in zip(weights, x, y, strict=True)) / spread
    return b, mean_y - b * mean_x
