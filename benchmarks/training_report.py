"""What training shows: a table, plots of loss curves and times, result rows."""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks import record, require
from benchmarks.figures import COLOURS, STYLE, open_pyplot, write_figure
from benchmarks.task import Run, Task
from benchmarks.train import CLOSE_STEPS, largest_gap


class Training(NamedTuple):
    """What was trained with one set of options: a run for each module."""

    task: Task
    runs: list[Run]

    @property
    def variant(self) -> str:
        return self.runs[0].variant

    @property
    def compared(self) -> bool:
        return len(self.runs) == 2


def print_table(trainings: list[Training]) -> None:
    """Times, memory, losses and metric of each module; speed-ups are over the first of two."""
    task = trainings[0].task
    rich = require("rich.console")
    console = rich.Console() if sys.stdout.isatty() else rich.Console(width=140)
    box = require("rich.box").SIMPLE_HEAD
    table = require("rich.table").Table(title=title(trainings), title_justify="left", box=box, pad_edge=False)
    named = len(trainings) > 1
    for heading in ["variant"] * named + ["module"]:
        table.add_column(heading, no_wrap=True)
    headings = (
        "s / epoch",
        "in the layer",
        f"{task.unit} / s",
        "speed-up",
        "of the layer",
        "peak MB",
        "train loss",
        task.metric,
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for training in trainings:
        for run in training.runs:
            table.add_row(*[run.variant] * named, run.label, *cells(training, run))
    console.print(table)
    for plan in dict.fromkeys(run.plan for training in trainings for run in training.runs if run.plan):
        print(f"seqkernels ran on {plan}")
    for training in trainings:
        for run in training.runs:
            if not math.isnan(run.quantized_metric):
                said, before = map(training.task.format_metric, (run.quantized_metric, run.metric))
                print(f"With {run.label} quantized to int8, {task.metric}{of(training)}: {said}, before {before}")
        if training.compared:
            print(f"Largest relative gap between the two loss curves{of(training)}: {gap_sentence(training.runs)}")


def cells(training: Training, run: Run) -> list[str]:
    """One row of the table, behind its names."""
    first, samples = training.runs[0], training.task.samples
    return [
        number(run.seconds, ".3g"),
        number(run.layer_seconds, ".3g"),
        number(samples / run.seconds, ",.0f"),
        number(first.seconds / run.seconds, ".2f") if training.compared else "-",
        number(first.layer_seconds / run.layer_seconds, ".2f") if training.compared else "-",
        number(run.peak_memory / 1e6, ",.1f"),
        number(run.loss, ".4f"),
        training.task.format_metric(run.metric),
    ]


def title(trainings: list[Training]) -> str:
    task = trainings[0].task
    whole = min(len(run.epoch_seconds) for training in trainings for run in training.runs)
    return f"{task.name}: {whole} of {task.options.epochs} epochs"


def of(training: Training) -> str:
    return f" of {training.variant}" if training.variant else ""


def number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def gap_sentence(runs: list[Run]) -> str:
    steps = min(len(run.losses) for run in runs)
    if steps <= CLOSE_STEPS:
        return f"{largest_gap(runs):.1e} over all {steps:,} steps."
    return (
        f"{largest_gap(runs, CLOSE_STEPS):.1e} in the first {CLOSE_STEPS} steps; "
        f"{largest_gap(runs, window=CLOSE_STEPS):.1e} between means of {CLOSE_STEPS} steps, over all {steps:,}."
    )


def row(training: Training) -> dict[str, Any]:
    """The result row: what was run, where, and each module's figures."""
    task, runs = training
    gaps = {}
    if training.compared:
        gaps = {
            "gap": largest_gap(runs),
            "gap_first_steps": largest_gap(runs, CLOSE_STEPS),
            "gap_of_means": largest_gap(runs, window=CLOSE_STEPS),
        }
    return {
        "task": task.name,
        "variant": training.variant,
        "description": task.description,
        "options": record.options_of(task.options),
        "seed": task.options.seed,
        "dtype": task.options.dtype,
        "device": str(task.device),
        "processes": task.world.size,
        **record.environment(),
        "metric": task.metric,
        "modules": {run.label: figures(task, run) for run in runs},
        **gaps,
    }


def figures(task: Task, run: Run) -> dict[str, Any]:
    return {
        "plan": run.plan,
        "steps": len(run.losses),
        "seconds_per_epoch": run.seconds,
        "epoch_seconds": run.epoch_seconds,
        "layer_seconds_per_epoch": run.layer_seconds,
        "peak_memory_bytes": run.peak_memory,
        "samples_per_second": task.samples / run.seconds,
        "train_loss": run.loss,
        "metric": run.metric,
        "quantized_metric": run.quantized_metric,
    }


def plot(trainings: list[Training], path: Path) -> None:
    """Loss over the steps and seconds an epoch; small ones, side by side, for several variants."""
    pyplot = open_pyplot()
    labels = " and with ".join(run.label for run in trainings[0].runs)
    with pyplot.rc_context(STYLE):
        if len(trainings) == 1:
            figure, (losses, times) = pyplot.subplots(
                1, 2, figsize=(11, 4.2), width_ratios=(1.8, 1), layout="constrained"
            )
            plot_losses(losses, trainings[0].runs)
            plot_times(times, trainings[0].runs)
            figure.suptitle(f"{trainings[0].task.name}: training with {labels}")
        else:
            columns = 3
            rows = -(-len(trainings) // columns)
            figure = pyplot.figure(figsize=(12, 2.8 * rows + 3), layout="constrained")
            small, times = figure.subfigures(2, 1, height_ratios=(2.8 * rows, 3))
            panels = small.subplots(rows, columns, sharey=True, squeeze=False)
            for axes, training in zip(panels.flat, trainings, strict=False):
                plot_losses(axes, training.runs)
                axes.legend().remove()
                axes.set(xlabel="", ylabel="")
                axes.set_title(training.variant, fontsize=13)
            panels[0, 0].legend([run.label.partition(".")[0] for run in trainings[0].runs])
            for axes in panels.flat[len(trainings) :]:
                axes.remove()
            small.supxlabel("step", fontsize=13)
            small.supylabel("train loss, running mean", fontsize=13)
            plot_all_times(times.subplots(), trainings)
            figure.suptitle(trainings[0].task.name)
        write_figure(figure, path)


def plot_confusion(counts: Tensor, labels: list[str], title: str, path: Path) -> None:
    """[labels, labels] Which answer (across) was given for what is right (down), as shares of each row."""
    pyplot = open_pyplot()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    with pyplot.rc_context(STYLE | {"font.size": 11, "text.parse_math": False}):  # a $ in a label is a $
        figure, axes = pyplot.subplots(figsize=(8.4, 7.4), layout="constrained")
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
        axes.set(title=title, xlabel="answered", ylabel="right")
        figure.colorbar(image, label="share of the row", shrink=0.8)
        write_figure(figure, path)


def plot_all_times(axes: Any, trainings: list[Training]) -> None:
    """A group of bars for each variant."""
    for place, training in enumerate(trainings):
        for index, run in enumerate(training.runs):
            offset = (index - (len(training.runs) - 1) / 2) * 0.4
            axes.bar(place + offset, run.seconds, width=0.38, color=COLOURS[index], alpha=0.6)
        if training.compared:
            text = f"{training.runs[0].seconds / training.runs[1].seconds:.1f} x"
            highest = max(run.seconds for run in training.runs)
            axes.annotate(text, (place, highest), (0, 3), textcoords="offset points", ha="center", va="bottom")
    labels = [training.variant.replace(", ", "\n") for training in trainings]
    axes.set_xticks(range(len(trainings)), labels)
    axes.set(ylabel="seconds per epoch")
    axes.margins(y=0.15)


def plot_losses(axes: Any, runs: list[Run]) -> None:
    """The first curve thick and pale, the second thin on top of it, so that both show where they agree."""
    window = max(1, max(len(run.losses) for run in runs) // 50)
    for index, run in enumerate(runs):
        here = min(window, len(run.losses))  # less where Ctrl-C ended the run
        curve = running_mean(run.curve, here)
        style = {"linewidth": 6, "alpha": 0.35} if index == 0 and len(runs) == 2 else {"linewidth": 1.8}
        axes.plot(range(here, len(run.losses) + 1), curve, color=COLOURS[index], label=run.label, **style)
    axes.set(xlabel="step", ylabel="train loss" if window == 1 else f"train loss, mean of {window} steps")
    axes.legend()


def running_mean(values: Tensor, window: int) -> Tensor:
    """[steps] -> [steps - window + 1]"""
    return values.unfold(0, window, 1).mean(dim=1)


def plot_times(axes: Any, runs: list[Run]) -> None:
    """The median as a bar, each epoch as a dot."""
    for index, run in enumerate(runs):
        axes.bar(run.label, run.seconds, width=0.6, color=COLOURS[index], alpha=0.6)
        axes.plot([run.label] * len(run.epoch_seconds), run.epoch_seconds, "o", color="black", markersize=3)
        speedup = f"\n{runs[0].seconds / run.seconds:.2f} x as fast" if index else ""
        highest = max(run.epoch_seconds, default=math.nan)
        label = f"{run.seconds:.2f} s{speedup}"
        axes.annotate(label, (index, highest), (0, 6), textcoords="offset points", ha="center", va="bottom")
    axes.set(ylabel="seconds per epoch")
    axes.margins(y=0.2)
