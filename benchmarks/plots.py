"""Plots of the rows that `kernels` and `scaling` wrote."""

from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.cases import CASES
from benchmarks.contenders import OURS, OWN
from benchmarks.problems import PROBLEMS, Problem, gates_of
from benchmarks.record import Row, gpu_rows, ordered, plotted_rows

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def draw(rows: list[Row], scaling: list[Row], folder: Path) -> list[Path]:
    """The plots that there are rows for."""
    drawn = []
    timed = [row for row in rows if "median_ms" in row]
    beside = [row for row in timed if row["contender"] == OWN and "speedup" in row]
    for name, plot, given in (
        ("overview-cpu", plot_overview, plotted_rows(beside)),
        ("overview-gpu", plot_overview, [row for row in gpu_rows(beside) if row["dtype"] == "tf32"]),
        ("speedup", plot_speedup, plotted_rows(beside)),
        (
            "roofline",
            plot_roofline,
            [row for row in plotted_rows(timed) if row["contender"] == OURS and row["peak_gflops"]],
        ),
        ("packed", plot_packed, [row for row in plotted_rows(timed) if row["mode"] == "train"]),
        ("scaling", plot_scaling, scaling),
    ):
        if not given:
            continue
        pyplot = figures.open_pyplot()
        with pyplot.rc_context(figures.STYLE | {"svg.hashsalt": name}):  # the same rows, the same file
            figure = plot(pyplot, given)
            for kind in ("png", "svg"):
                drawn.append(folder / f"kernels-{name}.{kind}")
                figures.write_figure(figure, drawn[-1])
    return drawn


def plot_overview(pyplot: Any, rows: list[Row]) -> Any:
    """GRU and LSTM, padded and packed, on one page: bars to the right of the line are faster than torch.nn, to the left
    of it slower. A panel each for inference and training."""
    modes = {"infer": "inference", "train": "training step"}
    columns = [(cell, layout) for cell in ("GRU", "LSTM") for layout in CASES["layout"]]
    problems = ordered((row["problem"] for row in rows), PROBLEMS)
    height = 1.6 + 0.42 * len(problems)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, height), layout="constrained", sharex=True, sharey=True)
    for axes, (mode, title) in zip(panels, modes.items(), strict=True):
        for place, (cell, layout) in enumerate(columns):
            here = [row for row in rows if (row["mode"], row["cell"], row["layout"]) == (mode, cell, layout)]
            at = [problems.index(row["problem"]) + (place - 1.5) * 0.2 for row in here]
            times = [row["speedup"] for row in here]
            colour, label = figures.CELL_COLOURS[cell], f"{cell} {layout}"
            bars = {"height": 0.18, "color": colour, "alpha": 1 if layout == "padded" else 0.5, "label": label}
            axes.barh(at, [time - 1 for time in times], left=1, **bars)
        axes.axvline(1, color="black", linewidth=1)
        axes.set(title=title, xscale="log", xlabel="times as fast as torch.nn")
        axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
        axes.minorticks_off()
    panels[0].set_yticks(range(len(problems)), problems)
    panels[0].invert_yaxis()
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"seqkernels beside torch.nn, {conditions(rows)}")
    return figure


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
            axes.bar(at, values, width=0.25, color=figures.CELL_COLOURS[name], label=name)
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
        for name, colour in figures.CELL_COLOURS.items():
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
    gates = gates_of(row["cell"]) * problem.H
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
                packed, padded = (times.get((problem, name, layout)) for layout in ("packed", "padded"))
                if packed and padded:
                    ratio = packed["median_ms"] / padded["median_ms"]
                    axes.bar(
                        index + (place - 1) * 0.27, ratio, width=0.25, color=figures.CELL_COLOURS[name], label=name
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
        packed, padded = (times.get((problem, name, layout)) for layout in ("packed", "padded"))
        if packed and padded:
            return packed["gflops"] * packed["median_ms"] / (padded["gflops"] * padded["median_ms"])
    return float("nan")


def plot_scaling(pyplot: Any, rows: list[Row]) -> Any:
    """Microseconds a step over each axis."""
    axes_names = ordered((row["axis"] for row in rows), ())
    columns = 3
    lines = -(-len(axes_names) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(12, 3.6 * lines), layout="constrained", squeeze=False)
    for axes, axis in zip(panels.flat, axes_names, strict=False):
        for contender, colour in zip((OWN, OURS), figures.COLOURS, strict=True):
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
