"""`python -m benchmarks report`: tables and plots of the rows that `kernels` and `scaling` wrote."""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import InputError, kernels, plotting, record, require
from benchmarks.contenders import CASES
from benchmarks.problems import GATES, PROBLEMS, Problem

Row = dict[str, Any]
MARKERS = "<!-- kernels: written by `python -m benchmarks report --readme` -->", "<!-- end of kernels -->"
KEY = ("problem", "cell", "mode", "layout", "dtype", "threads", "device")
OURS, OWN = "seqkernels", "torch.nn"
OLD, DIRTY = "†", "‡"
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=Path, default=record.RESULTS, metavar="DIR", help="where the rows are (benchmarks/results)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="write the float32 tables into FILE, between its two markers"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw into DIR, as PNG and SVG")


def run(options: argparse.Namespace) -> int:
    """Print, write and draw what is asked for; 1 if rows had to be refused."""
    rows = read(options.rows / "kernels.jsonl")
    refused = {key(row) for row in rows if row.get("right") is not True}
    for case in sorted(refused, key=str):
        print(f"refused, its results were wrong: {' '.join(map(str, case))}", file=sys.stderr)
    rows = newest(row for row in rows if key(row) not in refused)
    found = tables(rows)
    if options.markdown:
        print("\n\n".join(map(markdown, found)))
    else:
        for table in found:
            show(table)
    if options.readme:
        write_between(options.readme, "\n\n".join(map(markdown, tables(readme_rows(rows)))))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        scaling = options.rows / "scaling.jsonl"
        for path in draw(rows, newest(read(scaling), scaling_key) if scaling.exists() else [], options.plots):
            print(f"Plot: {path}")
    return 1 if refused else 0


def read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): `python -m benchmarks kernels` writes it."
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no file of result rows: {error}.") from None


def key(row: Row) -> tuple:
    return tuple(row.get(name) for name in KEY)


def scaling_key(row: Row) -> tuple:
    return tuple(row.get(name) for name in ("axis", "value", "cell", "mode", "dtype"))


def newest(rows: Iterable[Row], of: Callable[[Row], tuple] = key) -> list[Row]:
    """Of each case and contender the last row that was written."""
    last = {(of(row), row["contender"]): row for row in rows}
    return list(last.values())


@functools.cache
def differs(commit: str | None) -> bool:
    """Whether the library has changed since a commit, as far as git can say."""
    if commit is None:
        return True
    return record.git("diff", "--quiet", commit, "--", "csrc", "seqkernels", "setup.py") is None


def marks(row: Row) -> str:
    return (OLD if differs(row["commit"]) else "") + (DIRTY if row["dirty"] else "")


# ---- tables


class Table(NamedTuple):
    title: str
    headings: list[str]
    lines: list[list[str]]
    notes: list[str]


def tables(rows: list[Row]) -> list[Table]:
    """One for each mode, dtype, thread count and device; a line a problem, a column for each cell and layout."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in ("device", "dtype", "threads", "mode")), []).append(row)
    return [table(name, group) for name, group in groups.items()]


def table(group: tuple, rows: list[Row]) -> Table:
    device, dtype, threads, mode = group
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
    where = f"{threads} thread{'s' * (threads != 1)}" if device == "cpu" else device
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


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def ordered(names: Iterable[str], first: Iterable[str]) -> list[str]:
    """Without repetition; those in `first` in its order, then the others as they come."""
    names = list(dict.fromkeys(names))
    first = [name for name in first if name in names]
    return first + [name for name in names if name not in first]


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


def readme_rows(rows: list[Row]) -> list[Row]:
    """The comparison most people look for: float32, and as many threads as there are."""
    rows = [row for row in rows if row["dtype"] == "float32"]
    most = {
        device: max(row["threads"] for row in rows if row["device"] == device) for device in {r["device"] for r in rows}
    }
    return [row for row in rows if row["threads"] == most[row["device"]]]


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


# ---- plots


def draw(rows: list[Row], scaling: list[Row], folder: Path) -> list[Path]:
    """The plots that there are rows for."""
    drawn = []
    timed = [row for row in rows if "median_ms" in row]
    for name, plot, given in (
        ("speedup", plot_speedup, [row for row in readme_rows(timed) if row["contender"] == OWN and "speedup" in row]),
        (
            "roofline",
            plot_roofline,
            [row for row in readme_rows(timed) if row["contender"] == OURS and row["peak_gflops"]],
        ),
        ("packed", plot_packed, [row for row in readme_rows(timed) if row["mode"] == "train"]),
        ("scaling", plot_scaling, scaling),
    ):
        if not given:
            continue
        pyplot = plotting.open_pyplot()
        with pyplot.rc_context(plotting.STYLE):
            figure = plot(pyplot, given)
            for kind in ("png", "svg"):
                drawn.append(folder / f"kernels-{name}.{kind}")
                plotting.write_figure(figure, drawn[-1])
    return drawn


def plot_speedup(pyplot: Any, rows: list[Row]) -> Any:
    """Bars by problem, a panel for each way of running, a colour for each cell; below the line torch.nn is faster."""
    ways = ordered(((row["mode"], row["layout"]) for row in rows), ())
    figure, panels = pyplot.subplots(len(ways), 1, figsize=(11, 3 * len(ways)), layout="constrained", squeeze=False)
    for axes, way in zip(panels.flat, ways, strict=True):
        here = [row for row in rows if (row["mode"], row["layout"]) == way]
        problems = ordered((row["problem"] for row in here), PROBLEMS)
        for place, name in enumerate(CASES["cell"]):
            found = {row["problem"]: row for row in here if row["cell"] == name}
            at = [index + (place - 1) * 0.27 for index, problem in enumerate(problems) if problem in found]
            values = [found[problem]["speedup"] for problem in problems if problem in found]
            axes.bar(at, values, width=0.25, color=plotting.CELL_COLOURS[name], label=name)
            for x, value in zip(at, values, strict=True):
                axes.annotate(f"{value:.1f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=9)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(problems)), problems)
        axes.set(title=f"{'inference' if way[0] == 'infer' else 'training'}, {way[1]}", ylabel="times as fast")
        axes.margins(y=0.12)
    panels[0, 0].legend(ncols=3)
    figure.suptitle(f"seqkernels beside torch.nn, {conditions(rows)}")
    return figure


def conditions(rows: list[Row]) -> str:
    row = rows[0]
    where = f"{row['threads']} threads of {row['cpu']}" if row["device"] == "cpu" else row["gpu"]
    return f"{row['dtype']}, {where}"


def plot_roofline(pyplot: Any, rows: list[Row]) -> Any:
    """What is reached of the peak, over the work for each byte that must be read or written at least once."""
    modes = {"infer": "inference", "train": "training"}
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True, sharey=True)
    peak = max(row["peak_gflops"] for row in rows)
    for axes, (mode, title) in zip(panels, modes.items(), strict=True):
        for name, colour in plotting.CELL_COLOURS.items():
            here = [row for row in rows if (row["cell"], row["mode"], row["layout"]) == (name, mode, "padded")]
            axes.plot([*map(intensity, here)], [row["gflops"] for row in here], "o", color=colour, label=name)
            if name == "GRU":
                name_points(axes, sorted(here, key=intensity), colour)
        axes.set(xscale="log", yscale="log", xlabel="operations for each byte of weights, input and output")
        axes.set_title(title)
        axes.axhline(peak, color="black", linewidth=1)
    panels[0].set(ylabel="GFLOP/s", ylim=(None, 1.5 * peak))
    panels[0].annotate(
        f"peak, measured in the same run: {peak:.0f} GFLOP/s",
        (0.02, peak),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    panels[1].legend(loc="lower left")
    figure.suptitle(f"How much of the machine is used, padded, {conditions(rows)}")
    return figure


def name_points(axes: Any, rows: list[Row], colour: str) -> None:
    """Names run to the left, each lower than that of its left neighbour, so that no line meets a name."""
    for place, row in enumerate(rows):
        left = row["problem"] == "step"  # stands at the edge, alone
        axes.annotate(
            row["problem"],
            (intensity(row), row["gflops"]),
            (intensity(row), 0.57 - 0.065 * place),
            textcoords=("data", "axes fraction"),
            ha="left" if left else "right",
            fontsize=10,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0 if left else 1, 0.5)},
        )


def intensity(row: Row) -> float:
    problem = Problem(*(row[name] for name in Problem._fields))
    gates = GATES[row["cell"]] * problem.H
    weights = gates * (problem.I + problem.H) + (problem.layers - 1) * gates * 2 * problem.H
    rows = row["T"] * row["B"]
    return row["gflops"] * row["median_ms"] * 1e6 / (BYTES[row["dtype"]] * (weights + rows * (problem.I + problem.H)))


def plot_packed(pyplot: Any, rows: list[Row]) -> Any:
    """Time of a packed batch in padded ones; the line is the share of rows that are no padding."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, contender in zip(panels, (OWN, OURS), strict=True):
        times = {(r["problem"], r["cell"], r["layout"]): r for r in rows if r["contender"] == contender}
        problems = ordered((problem for problem, _, layout in times if layout == "packed"), PROBLEMS)
        for place, name in enumerate(CASES["cell"]):
            for index, problem in enumerate(problems):
                both = [times.get((problem, name, layout)) for layout in ("packed", "padded")]
                if None not in both:
                    ratio = both[0]["median_ms"] / both[1]["median_ms"]
                    axes.bar(
                        index + (place - 1) * 0.27, ratio, width=0.25, color=plotting.CELL_COLOURS[name], label=name
                    )
        for index, problem in enumerate(problems):
            share = share_of_rows(times, problem)
            axes.plot([index - 0.42, index + 0.42], [share, share], color="black", linewidth=2)
        axes.set_xticks(range(len(problems)), problems, rotation=40, ha="right")
        axes.set(title=contender)
    panels[0].set(ylabel="time of packed / time of padded")
    handles, labels = panels[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    panels[0].legend(named.values(), named.keys())
    figure.suptitle(f"Training packed against padded; black: share of rows, {conditions(rows)}")
    return figure


def share_of_rows(times: dict[tuple, Row], problem: str) -> float:
    """Operations of the packed case in those of the padded one, which both rows tell by their speed."""
    for name in CASES["cell"]:
        both = [times.get((problem, name, layout)) for layout in ("packed", "padded")]
        if None not in both:
            packed, padded = (row["gflops"] * row["median_ms"] for row in both)
            return packed / padded
    return float("nan")


def plot_scaling(pyplot: Any, rows: list[Row]) -> Any:
    """Microseconds a step over each axis."""
    axes_names = ordered((row["axis"] for row in rows), ())
    columns = 3
    lines = -(-len(axes_names) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(12, 3.6 * lines), layout="constrained", squeeze=False)
    for axes, axis in zip(panels.flat, axes_names, strict=False):
        for contender, colour in zip((OWN, OURS), plotting.COLOURS, strict=True):
            here = sorted(
                (r for r in rows if r["axis"] == axis and r["contender"] == contender), key=lambda r: r["value"]
            )
            axes.plot([r["value"] for r in here], [r["step_us"] for r in here], "o-", color=colour, label=contender)
        logarithmic = axis not in ("threads", "layers", "raggedness")
        axes.set(xlabel=axis, ylabel="us a step", xscale="log" if logarithmic else "linear", ylim=(0, None))
        ticks: list[float] = []
        for value in sorted({row["value"] for row in rows if row["axis"] == axis}):
            if not (logarithmic and ticks and value < 1.4 * ticks[-1]):  # 129 beside 128 could not be read
                ticks.append(value)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    for axes in panels.flat[len(axes_names) :]:
        axes.remove()
    panels[0, 0].legend()
    first = rows[0]
    figure.suptitle(
        f"{first['cell']}, {'training' if first['mode'] == 'train' else 'inference'}, {first['dtype']}, {first['cpu']}"
    )
    return figure
