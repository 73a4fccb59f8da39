"""What a training run shows: a table, a plot of loss curves and times, a result row."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record, require
from benchmarks.train import CLOSE_STEPS, Run, Task, largest_gap

COLOURS = ("#d55e00", "#0072b2")  # told apart in grey and with any colour vision


def print_table(task: Task, runs: list[Run]) -> None:
    """Times, losses and metric of each module; the speed-up is over the first of two."""
    console = require("rich.console").Console()
    box = require("rich.box").SIMPLE_HEAD
    table = require("rich.table").Table(title=title(task, runs), title_justify="left", box=box, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for heading in ("s / epoch", f"{task.unit} / s", "speed-up", "train loss", task.metric):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.label,
            number(run.seconds, ".2f"),
            number(task.samples / run.seconds, ",.0f"),
            number(runs[0].seconds / run.seconds, ".2f") if len(runs) == 2 else "-",
            number(run.loss, ".4f"),
            task.format_metric(run.metric),
        )
    console.print(table)
    for run in runs:
        if run.plan:
            print(f"{run.label} ran on {run.plan}")
    if len(runs) == 2:
        print(f"Largest relative gap between the two loss curves: {gap_sentence(runs)}")


def title(task: Task, runs: list[Run]) -> str:
    whole = min(len(run.epoch_seconds) for run in runs)
    return f"{task.name}: {whole} of {task.options.epochs} epochs"


def number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def gap_sentence(runs: list[Run]) -> str:
    steps = min(len(run.losses) for run in runs)
    first = f"{largest_gap(runs, CLOSE_STEPS):.1e} in the first {CLOSE_STEPS} steps, " if steps > CLOSE_STEPS else ""
    return f"{first}{largest_gap(runs):.1e} over all {steps:,} steps."


def row(task: Task, runs: list[Run]) -> dict[str, Any]:
    """The result row: what was run, where, and each module's figures."""
    gaps = {"gap": largest_gap(runs), "gap_first_steps": largest_gap(runs, CLOSE_STEPS)} if len(runs) == 2 else {}
    return {
        "task": task.name,
        "description": task.description,
        "options": record.options_of(task.options),
        "seed": task.options.seed,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
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
        "samples_per_second": task.samples / run.seconds,
        "train_loss": run.loss,
        "metric": run.metric,
    }


def plot(task: Task, runs: list[Run], path: Path) -> None:
    """Loss over the steps and seconds an epoch, written whole or not at all."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with pyplot.rc_context(style):
        figure, (losses, times) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.8, 1), layout="constrained")
        plot_losses(losses, runs)
        plot_times(times, runs)
        figure.suptitle(f"{task.name}: training with {' and with '.join(run.label for run in runs)}")
        unfinished = path.with_suffix(".unfinished")
        figure.savefig(unfinished, format="png", dpi=150)
        pyplot.close(figure)
    os.replace(unfinished, path)


def plot_losses(axes: Any, runs: list[Run]) -> None:
    """The first curve wide and pale, the second thin on top of it, so that both show where they agree."""
    window = max(1, max(len(run.losses) for run in runs) // 50)
    for index, run in enumerate(runs):
        curve = running_mean(run.curve, window)
        wide = {"linewidth": 6, "alpha": 0.35} if index == 0 and len(runs) == 2 else {"linewidth": 1.8}
        axes.plot(range(window, len(run.losses) + 1), curve, color=COLOURS[index], label=run.label, **wide)
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
