"""`python -m benchmarks report`: tables and plots of the rows that the commands that measure wrote."""

import argparse
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks import (
    InputError,
    calls,
    cells,
    ensembles,
    kernels,
    models,
    plots,
    quantized,
    record,
    require,
    resets,
    single_steps,
)
from benchmarks.cases import CASES
from benchmarks.contenders import OURS, OWN
from benchmarks.problems import PROBLEMS
from benchmarks.record import Row, cpu_rows, differs, gpu_rows, key, newest, ordered, read, scaling_key, step_key

MARKERS = "<!-- kernels: written by `python -m benchmarks report --readme` -->", "<!-- end of kernels -->"
OLD, DIRTY = "†", "‡"


# Whose rows and tables are their own.
BY_MODULE: dict[str, ModuleType] = {
    "models": models,
    "resets": resets,
    "ensembles": ensembles,
    "quantized": quantized,
    "cells": cells,
    "single-steps": single_steps,
}
IN_README = ("resets", "ensembles")  # of those; others are in pages of their own


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=Path, default=record.RESULTS, metavar="DIR", help="where the rows are (benchmarks/results)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="write the tables of CPUs with all their threads, of GPUs, of resets and of ensembles into FILE, between "
        "its two markers",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw into DIR, as PNG and SVG")


def run(options: argparse.Namespace) -> int:
    """Print, write and draw what is asked for; 1 if rows had to be refused."""
    names = "kernels", "calls", "steps", *BY_MODULE
    file, *others = (options.rows / f"{name}.jsonl" for name in names)
    of_calls, of_steps, *_ = others
    rows = read(file) if file.exists() or not any(path.exists() for path in others) else []
    refused = {key(row) for row in rows if row.get("right") is not True}
    for case in sorted(refused, key=str):
        print(f"refused, its results were wrong: {' '.join(map(str, case))}", file=sys.stderr)
    rows = newest(row for row in rows if key(row) not in refused)
    found = tables(rows) + busy_tables(rows)
    found += [Table(*parts) for parts in calls.tables(read(of_calls))] if of_calls.exists() else []
    found += step_tables(newest(read(of_steps), step_key)) if of_steps.exists() else []
    for name in BY_MODULE:
        found += tables_of(name, options.rows)
    if options.markdown:
        print("\n\n".join(map(markdown, found)))
    else:
        for table in found:
            show(table)
    if options.readme:
        write_between(options.readme, "\n\n".join(map(markdown, readme_tables(rows, options.rows))))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        scaling = options.rows / "scaling.jsonl"
        for path in plots.draw(rows, newest(read(scaling), scaling_key) if scaling.exists() else [], options.plots):
            print(f"Plot: {path}")
    return 1 if refused else 0


class Table(NamedTuple):
    title: str
    headings: list[str]
    lines: list[list[str]]
    notes: list[str]


def readme_tables(rows: list[Row], folder: Path) -> list[Table]:
    found = tables(cpu_rows(rows)) + tables(gpu_rows(rows)) + busy_tables(rows)
    return found + [table for name in IN_README for table in tables_of(name, folder)]


def tables_of(name: str, folder: Path) -> list[Table]:
    """Those of a command of `BY_MODULE`, if it has rows."""
    file = folder / f"{name}.jsonl"
    return [Table(*parts) for parts in BY_MODULE[name].tables(read(file))] if file.exists() else []


def tables(rows: list[Row]) -> list[Table]:
    """One for each mode, dtype, thread count and device; a line a problem, a column for each cell and layout."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        device = row["cpu"] if row["device"] == "cpu" else row["gpu"]
        groups.setdefault((row["mode"], row["dtype"], row["threads"], device), []).append(row)
    return [table(name, group) for name, group in groups.items()]


def table(group: tuple, rows: list[Row]) -> Table:
    mode, dtype, threads, device = group
    others = ordered((row["contender"] for row in rows if "speedup" in row), (OWN,))
    columns = [
        (c, y) for c in CASES["cell"] for y in CASES["layout"] if any((r["cell"], r["layout"]) == (c, y) for r in rows)
    ]
    by_case: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault((row["problem"], row["cell"], row["layout"]), {})[row["contender"]] = row
    lines, seen = [], ""
    for problem in ordered((row["problem"] for row in rows), PROBLEMS):
        lines.append([problem, *(cell(by_case.get((problem, *column), {}), others) for column in columns)])
        seen += "".join(lines[-1])
    means = ["geometric mean"]
    for column in columns:
        mean = [geometric_mean([row["speedup"] for row in rows if of_column(row, column, name)]) for name in others]
        means.append(" / ".join(f"{value:.2f}" if value else "-" for value in mean))
    sets = ", ".join(ordered((row["isa"] for row in rows if row.get("isa")), ()))
    where = f"{threads} thread{'s' * (threads != 1)} of {device}" if threads else device
    where += f" ({sets})" if sets else ""
    peaks = [row["peak_gflops"] for row in rows if row["peak_gflops"]]
    notes = [f"ms of seqkernels: how many times as fast it is as {' / '.join(others)}; = within the spread."]
    if peaks:
        ends = dict.fromkeys(f"{peak:.0f}" for peak in (min(peaks), max(peaks)))
        notes.append(f"Peak of this machine in the same run: {'..'.join(ends)} GFLOP/s.")
    if OLD in seen:
        notes.append(f"{OLD} measured before the library was last changed.")
    if DIRTY in seen:
        notes.append(f"{DIRTY} measured with uncommitted changes.")
    name = {"infer": "Inference", "train": "Training step (forward and backward)"}[mode]
    return Table(f"{name}, {dtype}, {where}", ["", *(f"{c} {y}" for c, y in columns)], [*lines, means], notes)


def busy_tables(rows: list[Row]) -> list[Table]:
    """Times on a busy machine, and how many times as long as on a quiet one; a table for each machine."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if "busy_ms" in row:
            groups.setdefault((row["busy_processes"], row["threads"], row["cpus"], row["cpu"]), []).append(row)
    return [busy_table(where, group) for where, group in groups.items()]


def busy_table(group: tuple, rows: list[Row]) -> Table:
    processes, threads, cpus, cpu = group
    names = ordered((row["contender"] for row in rows), (OURS, OWN))
    by_case: dict[tuple, dict[str, str]] = {}
    for row in rows:
        times = f"{three_digits(row['busy_ms'])}{marks(row)}: {row['busy_ms'] / row['median_ms']:.1f}"
        case = tuple(row[name] for name in ("problem", "cell", "mode", "layout", "dtype"))
        by_case.setdefault(case, {})[row["contender"]] = times
    lines = [[" ".join(case), *(found.get(name, "-") for name in names)] for case, found in by_case.items()]
    others = f"{processes} other process{'es' * (processes != 1)}"
    notes = ["Median ms beside processes that compute all the time: how many times as long as without them."]
    title = f"Busy machine: {others} on {cpus} cores, {threads} thread{'s' * (threads != 1)} of {cpu}"
    return Table(title, ["", *names], lines, notes)


def step_tables(rows: list[Row]) -> list[Table]:
    """One for each device and dtype; a line a layer, a column for each path of ours and for the others."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["gpu"] or row["cpu"] or row["device"], row["dtype"]), []).append(row)
    return [step_table(name, group) for name, group in groups.items()]


def step_table(group: tuple, rows: list[Row]) -> Table:
    columns = ordered((column_of(row) for row in rows), ("cuda single CTA", "cuda cluster", "cuda persistent grid"))
    by_layer: dict[tuple, dict[tuple, float]] = {}
    for row in rows:  # of the widths of a path the quickest
        layer = by_layer.setdefault((row["cell"], row["H"], row["B"], row["directions"]), {})
        at = column_of(row), row["pass"]
        layer[at] = min(row["us"], layer.get(at, row["us"]))
    lines = []
    for (name, hidden, sequences, directions), found in sorted(by_layer.items()):
        title = f"{name}, H {hidden}, B {sequences}" + (f", {directions} directions" if directions > 1 else "")
        pairs = ([found.get((column, way)) for way in ("forward", "backward")] for column in columns)
        lines.append([title, *(" / ".join(f"{us:.2f}" if us else "-" for us in pair) for pair in pairs)])
    old = OLD if any(differs(row["commit"]) for row in rows) else ""
    notes = ["Microseconds of a step, forward / backward, of each path with the units that are quickest."]
    if old:
        notes.append(f"{OLD} measured before the library was last changed.")
    return Table(f"Steps, {group[1]}, {group[0]}{old}", ["", *columns], lines, notes)


def column_of(row: Row) -> str:
    return f"{row['contender']} {row.get('path') or ''}".strip()


def of_column(row: Row, column: tuple, contender: str) -> bool:
    return (row["cell"], row["layout"]) == column and row["contender"] == contender and "speedup" in row


def cell(rows: dict[str, Row], others: list[str]) -> str:
    """Our time and what the others' are of it; a loss looks like a win."""
    ours = rows.get(OURS)
    if ours is None or "median_ms" not in ours:
        return "-"
    texts = []
    for name in others:
        row = rows.get(name, {})
        texts.append(kernels.verdict(row).removesuffix("x") if "speedup" in row else "-")
    while texts and texts[-1] == "-":
        texts.pop()
    return f"{three_digits(ours['median_ms'])}{marks(ours)}: {' / '.join(texts)}"


def marks(row: Row) -> str:
    return (OLD if differs(row["commit"]) else "") + (DIRTY if row["dirty"] else "")


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def geometric_mean(values: list[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def markdown(table: Table) -> str:
    lines = [f"**{table.title}**", "", line_of(table.headings), line_of(["---"] * len(table.headings))]
    lines += map(line_of, table.lines)
    return "\n".join([*lines, "", " ".join(table.notes)])


def line_of(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def show(table: Table) -> None:
    rich = require("rich.console")
    drawn = require("rich.table").Table(
        title=table.title, title_justify="left", box=require("rich.box").SIMPLE_HEAD, pad_edge=False
    )
    for heading in table.headings:
        drawn.add_column(heading, no_wrap=True)
    for line in table.lines:
        drawn.add_row(*line)
    console = rich.Console() if sys.stdout.isatty() else rich.Console(width=200)
    console.print(drawn, "\n".join(table.notes), "", sep="\n")


def write_between(path: Path, text: str) -> None:
    """Replace what stands between the markers, and nothing else."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    begin, end = MARKERS
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise InputError(f"{path} does not have the two lines {begin} and {end}, once each and in this order.")
    before, rest = page.split(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    print(f"Tables: {path}")
