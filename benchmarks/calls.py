"""`python -m benchmarks calls`: what a short call costs the host, by layer of the software; launches, allocations."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import kernels, record
from benchmarks.call_layers import LAYERS
from benchmarks.cases import CASES, Case
from benchmarks.contenders import OURS, OWN
from benchmarks.options import add_conditions, check_device
from benchmarks.problems import CELLS, Problem
from benchmarks.record import Row, newest, ordered
from benchmarks.timing import Worker, stopping

SIZES = {  # so short that the call is most of what they cost
    "1x1x96": Problem(1, 1, 96, 96),
    "9x7x17": Problem(9, 7, 17, 17),
    "2x64x100": Problem(2, 64, 100, 100),
}
CONTENDERS = (OWN, "torch.nn float32", "onnxruntime", OURS, *LAYERS)
TITLES = {"infer": "a call", "train": "a forward and backward pass"}


def add_options(parser: argparse.ArgumentParser) -> None:
    def choices(option: str, values: Sequence[str], usual: Sequence[str]) -> None:
        text = f"{', '.join(values)} (usual: {' '.join(usual)})"
        parser.add_argument(option, nargs="+", default=list(usual), choices=values, metavar="NAME", help=text)

    choices("--size", tuple(SIZES), tuple(SIZES))
    choices("--cell", CELLS, CELLS)
    choices("--mode", CASES["mode"], CASES["mode"])
    choices("--dtype", CASES["dtype"], ("float32", "bfloat16"))
    add_conditions(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result was wrong."""
    check_device(options.device)
    file, started, failed = options.out / "calls.jsonl", record.environment()["time"], False
    print("us of host time, median (launches, allocations); what is below the module costs as much without it")
    with stopping([Worker(name, options.threads) for name in CONTENDERS]) as workers:
        for case in cases(options):
            common = {"benchmark": "calls", "run": started, **kernels.facts(case)}
            rows = [common | row for row in measure(case, workers, options.rounds)]
            record.append(file, *rows)
            failed |= not rows[0]["right"]
            show(case, rows)
    print(f"Rows: {file}")
    return int(failed)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for dtype, mode, cell, size in itertools.product(options.dtype, options.mode, options.cell, options.size):
        yield Case(size, cell, mode, "padded", dtype, options.threads, options.device, SIZES[size])


def measure(case: Case, workers: list[Worker], rounds: int) -> list[dict[str, Any]]:
    """A row for each contender, as those of `kernels`, but with the time of the host, and what it asked for."""
    rows = kernels.measure(case, workers, rounds, host=True)
    for worker, row in zip(workers, rows, strict=True):
        if "median_ms" in row:
            row |= worker.request("counts")
    return rows


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    if not rows[0]["right"]:
        print(f"{kernels.title(case)} WRONG: relative errors {kernels.said_errors(rows)}", flush=True)
        return
    texts = [f"{row['contender']} {said(row)}" for row in rows if "median_ms" in row]
    print(kernels.title(case), "  ".join(texts), flush=True)


def said(row: Row) -> str:
    """Microseconds, and in brackets launches and allocations as far as they are known."""
    counts = ", ".join(str(row[name]) for name in ("launches", "allocations") if row[name] is not None)
    return f"{row['median_ms'] * 1e3:.0f}" + (f" ({counts})" if counts else "")


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes: a table for each mode, dtype and device, a line for each cell and size."""
    rows = newest(row for row in rows if row["right"])
    for group in dict.fromkeys(tuple(row[name] for name in ("device", "dtype", "mode")) for row in rows):
        device, dtype, mode = group
        of_group = [row for row in rows if (row["device"], row["dtype"], row["mode"]) == group and "median_ms" in row]
        names = ordered((row["contender"] for row in of_group), CONTENDERS)
        by_case: dict[tuple[str, str], dict[str, Row]] = {}
        for row in of_group:
            by_case.setdefault((row["cell"], row["problem"]), {})[row["contender"]] = row
        lines = [[" ".join(case), *line(found, names)] for case, found in by_case.items()]
        title = f"Host time of {TITLES[mode]}, {dtype}, {device}"
        notes = [
            "us (launches, allocations) of sizes T x B x H; seqkernels is the module, the columns after it what "
            "lies below it; the last one is its share of the quickest other one's time."
        ]
        yield title, ["", *names, "share"], lines, notes


def line(found: dict[str, Row], names: list[str]) -> list[str]:
    others = [row["median_ms"] for name, row in found.items() if not name.startswith(OURS)]
    share = f"{found[OURS]['median_ms'] / min(others):.2f}" if OURS in found and others else "-"
    return [*(said(found[name]) if name in found else "-" for name in names), share]
