"""What `resets`, `ensembles`, `cells` and `quantized` share: forms of one case in this process, timed in rounds."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks import kernels, record
from benchmarks.cases import Case
from benchmarks.contenders import OURS, Unavailable
from benchmarks.models import Contender
from benchmarks.problems import Problem
from benchmarks.record import Row, ordered
from benchmarks.timing import paired, speedup, summary, timed_on_gpu


class TimedOnGpu(Contender):
    def request(self, count: int) -> list[float]:
        return [timed_on_gpu(self.run) for _ in range(count)]


def measure(
    case: Case,
    made: Mapping[str, Callable[[], Callable[[], list[Tensor]]]],
    errors_of: Callable[[str, Contender], list[float] | None],
    is_right: Callable[[dict[str, Row]], bool],
    rounds: int,
    ours: str = OURS,
) -> list[Row]:
    """A row for each contender: its errors, whether ours pass the gate, and the times if so.

    made: what makes a contender's run, by name; errors_of: None of one that computes something else.
    """
    rows: dict[str, Row] = {}
    able: list[Contender] = []
    for name, make in made.items():
        row: Row = {"contender": name, "absent": None}
        try:
            contender = (Contender if case.device == "cpu" else TimedOnGpu)(name, make())
            found = errors_of(name, contender)
            row |= {} if found is None else {"errors": found}
            able.append(contender)
        except Unavailable as reason:
            row["absent"] = str(reason)
        rows[name] = row
    right = is_right(rows)
    with torch.inference_mode(case.mode == "infer"):  # not in each run
        times = paired(able, rounds) if right else {}
    for name, row in rows.items():
        row["right"] = right
        if name in times:
            row |= summary(times[name]) | (speedup(times[name], times[ours]) if name != ours else {})
    return list(rows.values())


def cases(options: argparse.Namespace, sizes: Mapping[str, Problem]) -> Iterator[Case]:
    """Padded ones in float32, of every mode, cell and size that the options name."""
    for mode, cell, size in itertools.product(options.mode, options.cell, options.size):
        yield Case(size, cell, mode, "padded", "float32", options.threads, options.device, sizes[size])


def run(
    options: argparse.Namespace,
    benchmark: str,
    cases: Iterable[tuple[Case, Row]],
    measure: Callable[[Case, Row], list[Row]],
    title: Callable[[Case, Row], str] = lambda case, _: kernels.title(case),
) -> int:
    """Measure every case, of which rows say more than what all rows say; 1 if a result of ours was wrong."""
    file, started, failed = options.out / f"{benchmark}.jsonl", record.environment()["time"], False
    for case, more in cases:
        common = {"benchmark": benchmark, "run": started, **kernels.facts(case), **more}
        rows = [common | row for row in measure(case, more)]
        record.append(file, *rows)
        failed |= not rows[0]["right"]
        print(title(case, more), "  ".join(map(said, rows)), flush=True)
    print(f"Rows: {file}")
    return int(failed)


def said(row: Row) -> str:
    if "median_ms" not in row:
        return f"{row['contender']} {'absent' if row['right'] else 'WRONG'}"
    faster = f" ({kernels.verdict(row)})" if "speedup" in row else ""
    return f"{row['contender']} {row['median_ms']:.3f} ms{faster}"


def grouped(
    rows: Sequence[Row], of: Sequence[str], place: Sequence[str], order: Iterable[str]
) -> Iterator[tuple[tuple, list[str], list[list[str]]]]:
    """For each table, which `of` tells apart: what it is of, its headings, and a line for each place."""
    for group in dict.fromkeys(tuple(row[name] for name in of) for row in rows):
        by_place: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            if tuple(row[name] for name in of) == group:
                by_place.setdefault(tuple(row[name] for name in place), {})[row["contender"]] = row
        names = ordered((name for found in by_place.values() for name in found), order)
        lines = [[" ".join(at), *(text(found.get(name)) for name in names)] for at, found in by_place.items()]
        yield group, ["", *names], lines


def where(device: str, cpu: str, gpu: str, threads: int) -> str:
    return f"{cpu}, threads: {threads}" if device == "cpu" else gpu


def text(row: Row | None) -> str:
    if row is None:
        return "-"
    faster = f": {kernels.verdict(row).removesuffix('x')}" if "speedup" in row else ""
    return f"{row['median_ms']:.3g}{faster}"
