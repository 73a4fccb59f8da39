"""The training loop that every task shares: each module trains its own copy of one model, in turn, epoch by epoch."""

import argparse
import importlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import InputError, require

MODULES = {"torch": "torch.nn", "seqkernels": "seqkernels"}
MOST_THREADS = 1024
CLOSE_STEPS = 200  # rounding errors grow with every step; over the first ones, two right modules still agree closely


class Task(ABC):
    """What one task gives the shared loop. Loading the data (`__init__`) raises `InputError` where it is not usable."""

    name: str
    metric: str
    unit: str
    cell = "GRU"
    options: argparse.Namespace
    samples: int  # in one epoch
    description: str  # of data and model, for people

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the task's own options and set its defaults for the shared ones."""

    @abstractmethod
    def __init__(self, options: argparse.Namespace): ...

    @abstractmethod
    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        """The model, built around `rnn_class`, which takes torch.nn's arguments."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[tuple[Any, Tensor]]:
        """(input, target) in an order that depends on the seed and the epoch alone; a target is one sample."""

    @abstractmethod
    def loss(self, model: nn.Module, input: Any, target: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch and the state for the next one; the state is None in an epoch's first batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """The metric, on data that was not trained on."""

    @abstractmethod
    def format_metric(self, value: float) -> str: ...


@dataclass
class Run:
    """One module's training: what it trains, and what was measured of it."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[Tensor] = field(default_factory=list)  # one a step, also of an epoch that was cut short
    epoch_steps: int = 0
    epoch_seconds: list[float] = field(default_factory=list)  # of whole epochs
    metric: float = math.nan
    plan: str | None = None  # which of seqkernels' backends runs, and why

    @property
    def seconds(self) -> float:
        return median(self.epoch_seconds) if self.epoch_seconds else math.nan

    @property
    def curve(self) -> Tensor:
        """The loss of every step, [steps] in float64."""
        return torch.stack(self.losses).double()

    @property
    def loss(self) -> float:
        """The mean loss of the last epoch (of what there is, before the first has ended)."""
        return self.curve[-self.epoch_steps or None :].mean().item()


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The options of every task; a task sets its own defaults."""
    parser.add_argument("--module", choices=[*MODULES, "both"], default="both", help="which to train (both)")
    parser.add_argument("--epochs", type=positive, help="passes over the data (%(default)s)")
    parser.add_argument("--batch-size", type=positive, metavar="B", help="sequences a step (%(default)s)")
    parser.add_argument("--lr", type=positive_float, metavar="RATE", help="Adam's step size (%(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of weights and data order (%(default)s)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--limit", type=positive, metavar="N", help="use about N samples of the data, for a quick look")


def epoch_seed(options: argparse.Namespace, epoch: int) -> int:
    """A seed for each epoch, another one for each --seed."""
    return options.seed * 1_000_000 + epoch


def positive(text: str) -> int:
    if (number := natural(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def thread_count(text: str) -> int:
    if (number := positive(text)) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_THREADS}")
    return number


def natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most nine digits")
    return int(text)


def rnn_classes(choice: str, cell: str) -> dict[str, type[nn.Module]]:
    """The classes to compare, by the label they have in tables: nn.GRU, seqkernels.GRU."""
    classes = {}
    for name, module in MODULES.items():
        if choice in (name, "both"):
            try:
                classes[f"{module.removeprefix('torch.')}.{cell}"] = getattr(importlib.import_module(module), cell)
            except ImportError as error:
                raise InputError(
                    f"{module} cannot be imported ({error}): `pip install .` installs it, --module torch does without."
                ) from error
    return classes


def start_runs(task: Task, classes: dict[str, type[nn.Module]]) -> list[Run]:
    """A run for each class, all from the weights of one model of torch's own module."""
    torch.manual_seed(task.options.seed)
    weights = task.model(getattr(nn, task.cell)).state_dict()
    runs = []
    for label, rnn_class in classes.items():
        model = task.model(rnn_class)
        model.load_state_dict(weights)
        optimizer = torch.optim.Adam(model.parameters(), lr=task.options.lr, fused=True)
        runs.append(Run(label, model, optimizer))
    return runs


def train(task: Task, runs: list[Run]) -> bool:
    """Train all runs; False where Ctrl-C ended it early.

    The modules take turns, an epoch each, so that whatever else the machine does meanwhile falls on all of them.
    """
    try:
        for run in runs:
            warm_up(task, run)
        for epoch in range(task.options.epochs):
            for run in runs:
                train_epoch(task, run, epoch)
    except KeyboardInterrupt:
        return False
    return True


def warm_up(task: Task, run: Run) -> None:
    """Forward and backward once, untimed: no epoch pays for what a first call does, and the plan is known."""
    asked = []
    hook = run.model.rnn.register_forward_pre_hook(lambda rnn, inputs: asked.append(inputs))
    input, target = next(iter(task.batches(0)))
    task.loss(run.model, input, target, None)[0].backward()
    run.optimizer.zero_grad()
    hook.remove()
    if not isinstance(run.model.rnn, getattr(nn, task.cell)):
        run.plan = str(importlib.import_module("seqkernels").explain(run.model.rnn, *asked[0]))


def train_epoch(task: Task, run: Run, epoch: int) -> None:
    """One pass over the data: append the loss of each step and the seconds of the whole."""
    torch.manual_seed(epoch_seed(task.options, epoch))  # the same dropout for every module
    run.model.train()
    run.epoch_steps = 0
    state = None
    with progress_bar(task, f"{run.label} epoch {epoch + 1}/{task.options.epochs}") as bar:
        start = time.perf_counter()
        for input, target in task.batches(epoch):
            loss, state = task.loss(run.model, input, target, state)
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
            run.losses.append(loss.detach())
            run.epoch_steps += 1
            bar.update(target.numel())
            if not bar.disable and run.epoch_steps % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        run.epoch_seconds.append(time.perf_counter() - start)


def progress_bar(task: Task, label: str) -> Any:
    """Loss and samples a second of one epoch; silent where stderr is no terminal."""
    tqdm = require("tqdm").tqdm
    return tqdm(total=task.samples, desc=label, unit=f" {task.unit}", unit_scale=True, leave=False, disable=None)


def evaluate(task: Task, run: Run) -> None:
    run.model.eval()
    with torch.no_grad():
        run.metric = task.evaluate(run.model)


def largest_gap(runs: list[Run], steps: int | None = None) -> float:
    """The largest relative difference between two runs' losses of the same step, over the first `steps` or all."""
    first, second = (run.curve for run in runs)
    steps = min(len(first), len(second), steps or len(first))
    first, second = first[:steps], second[:steps]
    return ((second - first).abs() / first.abs()).max().item()
