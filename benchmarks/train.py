"""The training loop that every task shares: each module trains its own copy of one model, in turn, epoch by epoch."""

import argparse
import copy
import importlib
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import InputError, checkpoint, distributed, profiling, record, require
from benchmarks.distributed import World
from benchmarks.options import natural, positive, positive_float, thread_count

MODULES = {"torch": "torch.nn", "seqkernels": "seqkernels"}
DTYPES = ("float32", "float64", "bfloat16", "float16")
POOL = 50  # batches
PROFILED_BATCHES = 16
CLOSE_STEPS = 200  # rounding errors grow with every step; over the first ones, two right modules still agree closely


class Batch(NamedTuple):
    """What one training step sees."""

    input: Any
    target: Tensor
    weight: float = 1.0  # of this process's mean loss in the mean over all processes


class Task(ABC):
    """What one task gives the shared loop. Loading the data (`__init__`) raises `InputError` where it is not usable."""

    name: str
    metric: str
    unit: str
    cell = "GRU"  # which of torch.nn's recurrent modules is compared with ours
    shares_batches = False  # whether `torchrun` can divide its batches
    options: argparse.Namespace
    samples: int  # in one epoch
    description: str  # of data and model, for people

    @staticmethod
    @abstractmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        """Add the task's own options and set its defaults for the shared ones."""

    @staticmethod
    def variants(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
        """The options of each training that the task compares, by a label for tables; most tasks have one."""
        return {"": options}

    @abstractmethod
    def __init__(self, options: argparse.Namespace, world: World = World()):  # noqa: B008
        self.options = options
        self.world = world
        self.device = distributed.device_of(options.device)
        self.dtype = getattr(torch, options.dtype)

    @abstractmethod
    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        """The model, built around `rnn_class`, which takes torch.nn's arguments; its recurrent layer is `.rnn`."""

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[Batch]:
        """In an order that depends on the seed and the epoch alone; a target is one sample."""

    @abstractmethod
    def loss(self, model: nn.Module, input: Any, target: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The mean loss of a batch and the state for the next one; the state is None in an epoch's first batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """The metric, on data that was not trained on."""

    @abstractmethod
    def format_metric(self, value: float) -> str: ...

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(trainable(model), lr=self.options.lr, fused=True)

    def named(self, label: str) -> str:
        """A contender's name in tables, from that of its class."""
        return label

    def facts(self) -> dict[str, Any]:
        """What the model takes from the data; a checkpoint keeps it and continues with the same alone."""
        return {}

    def after_epoch(self, run: "Run", epoch: int) -> None:  # noqa: B027
        """Print what a task shows as it trains; most show nothing."""

    def finish(self, runs: "list[Run]", out: Path) -> list[Path]:
        """After the table: show what the trained models can do; returns the files it wrote."""
        return []


@dataclass
class Run:
    """One module's training: what it trains, and what was measured of it."""

    label: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    variant: str = ""
    called: Callable[..., Any] | None = None  # the model as the steps call it: compiled, or over several devices
    losses: list[Tensor] = field(default_factory=list)  # one a step, also of an epoch that was cut short
    epoch_steps: int = 0
    epoch_seconds: list[float] = field(default_factory=list)  # of whole epochs
    layer_share: float = math.nan  # of a step's time, spent in the recurrent layer
    peak_memory: float = math.nan  # bytes of one step
    metric: float = math.nan
    plan: str | None = None  # which of seqkernels' backends runs, and why

    def __post_init__(self) -> None:
        if self.called is None:
            self.called = self.model

    @property
    def seconds(self) -> float:
        return median(self.epoch_seconds) if self.epoch_seconds else math.nan

    @property
    def layer_seconds(self) -> float:
        """Of an epoch, in the recurrent layer."""
        return self.seconds * self.layer_share

    @property
    def curve(self) -> Tensor:
        """The loss of every step, [steps] in float64."""
        return torch.stack(self.losses).double().cpu()

    @property
    def loss(self) -> float:
        """The mean loss of the last epoch (of what there is, before the first has ended)."""
        return self.curve[-self.epoch_steps or None :].mean().item()

    def saved(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": torch.stack(self.losses) if self.losses else torch.empty(0),
            "epoch_steps": self.epoch_steps,
            "epoch_seconds": self.epoch_seconds,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        device = next(self.model.parameters()).device
        self.losses = list(saved["losses"].to(device).unbind())
        self.epoch_steps, self.epoch_seconds = saved["epoch_steps"], list(saved["epoch_seconds"])


@dataclass
class Position:
    """Where a training stands: the epoch, whose turn it is, and how far that run is in the epoch."""

    epoch: int = 0
    turn: int = 0
    step: int = 0
    state: Any = None  # carried into the next step
    seconds: float = 0.0  # of this turn so far

    def next(self, runs: int) -> None:
        last = self.turn + 1 == runs
        self.epoch, self.turn = self.epoch + last, 0 if last else self.turn + 1
        self.step, self.state, self.seconds = 0, None, 0.0


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """The options of every task; a task sets its own defaults."""
    parser.add_argument("--module", choices=[*MODULES, "both"], default="both", help="which to train (both)")
    parser.add_argument("--backend", metavar="NAME", help="of seqkernels, by force (default: its own choice)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and data (%(default)s)")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast of the forward")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--epochs", type=positive, help="passes over the data")
    parser.add_argument("--lr", type=positive_float, metavar="RATE", help="the optimizer's step size")
    parser.add_argument("--clip", type=positive_float, metavar="NORM", help="the largest norm of a step's gradient")
    parser.add_argument("--seed", type=natural, default=0, help="of weights, data order and dropout (%(default)s)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="keep the training in FILE, and continue from it if it is there"
    )
    parser.add_argument(
        "--save-every", type=positive, default=200, metavar="N", help="steps between two checkpoints (%(default)s)"
    )


def add_data_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The options of tasks whose data comes in batches."""
    parser.add_argument("--batch-size", type=positive, metavar="B", help=f"sequences a step ({batch_size})")
    parser.add_argument("--limit", type=positive, metavar="N", help="use about N samples of the data, for a quick look")


def epoch_seed(options: argparse.Namespace, epoch: int) -> int:
    """A seed for each epoch, another one for each --seed."""
    return options.seed * 1_000_000 + epoch


def bucketed(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Batches of sequences of about one length, longest first, in random order; each is the numbers of its sequences.

    A step costs its longest sequence; by chance alone nearly every batch has a long one. Sorted are the sequences of
    `POOL` batches at a time, so that who is with whom still changes from epoch to epoch.
    """
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(POOL * batch_size):
        batches += pool[lengths[pool].argsort(descending=True, stable=True)].split(batch_size)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


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


def start_runs(task: Task, classes: dict[str, type[nn.Module]], variant: str = "") -> list[Run]:
    """A run for each class, all from the weights of one model of torch's own module."""
    torch.manual_seed(task.options.seed)
    weights = task.model(getattr(nn, task.cell)).state_dict()
    runs = []
    for label, rnn_class in classes.items():
        model = task.model(rnn_class)
        model.load_state_dict(weights)
        model.to(task.device, task.dtype)
        for module in model.modules():
            if hasattr(module, "backend"):  # one of ours
                module.backend = task.options.backend
        runs.append(Run(task.named(label), model, task.optimizer(model), variant, as_called(task, model)))
    return runs


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("seqkernels.")


def as_called(task: Task, model: nn.Module) -> Callable[..., Any]:
    """The model as its steps call it."""
    called = torch.compile(model) if task.options.compile else model
    if task.world.size > 1:
        called = distributed.several_processes(called)
    return distributed.several_devices(called, task.device) if getattr(task.options, "data_parallel", False) else called


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy, of scores in 16 bits in float32."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), target)


def train(task: Task, runs: list[Run]) -> bool:
    """Train all runs; False where Ctrl-C ended it early.

    The modules take turns, an epoch each, so that whatever else the machine does meanwhile falls on all of them.
    """
    position = Position()
    try:
        for run in runs:
            warm_up(task, run)
        if task.options.checkpoint and task.options.checkpoint.exists():
            position = restore(task, runs)
        while position.epoch < task.options.epochs:
            train_epoch(task, runs[position.turn], position, partial(save, task, runs, position))
            task.after_epoch(runs[position.turn], position.epoch)
            position.next(len(runs))
            save(task, runs, position)
    except KeyboardInterrupt:
        return False
    return True


def warm_up(task: Task, run: Run) -> None:
    """Forward and backward once, untimed: no epoch pays for what a first call does, and the plan is known."""
    asked = []
    hook = run.model.rnn.register_forward_pre_hook(lambda rnn, inputs: asked.append(inputs))
    batch = next(iter(task.batches(0)))
    try:
        try_step(task, run, batch, run.model)
        hook.remove()
        if run.called is not run.model:
            try_step(task, run, batch, run.called)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{run.label} cannot do what the options ask: {str(error).splitlines()[0]}.") from error
    if asked and is_ours(run.model.rnn):
        run.plan = str(importlib.import_module("seqkernels").explain(run.model.rnn, *asked[0]))


def try_step(task: Task, run: Run, batch: Batch, model: Callable[..., Any]) -> None:
    """Forward and backward of one batch, without a step of the optimizer."""
    compute_loss(task, model, batch, None)[0].backward()
    run.model.zero_grad()


def compute_loss(task: Task, model: Callable[..., Any], batch: Batch, state: Any) -> tuple[Tensor, Any]:
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.options.amp):
        return task.loss(model, batch.input, batch.target, state)


def take_step(task: Task, run: Run, batch: Batch, state: Any) -> tuple[Tensor, Any]:
    """One step of the optimizer; returns the weighted loss before it, and the state for the next batch."""
    loss, state = compute_loss(task, run.called, batch, state)
    loss = loss * batch.weight
    run.optimizer.zero_grad()
    loss.backward()
    if task.options.clip:
        nn.utils.clip_grad_norm_(trainable(run.model), task.options.clip)
    run.optimizer.step()
    return loss.detach(), state


def train_epoch(task: Task, run: Run, position: Position, save: Callable[[], None]) -> None:
    """One pass over the data, or what `position` leaves of it: append the loss of each step, and the seconds."""
    if position.step == 0:
        torch.manual_seed(epoch_seed(task.options, position.epoch))  # the same dropout for every module
        run.epoch_steps = 0
    run.model.train()
    batches = iter(task.batches(position.epoch))
    with progress_bar(task, f"{run.label} epoch {position.epoch + 1}/{task.options.epochs}") as bar:
        for batch in itertools.islice(batches, position.step):  # that were trained on before the checkpoint
            bar.update(batch.target.numel() * task.world.size)
        start = time.perf_counter()
        for batch in batches:
            loss, position.state = take_step(task, run, batch, position.state)
            run.losses.append(task.world.mean(loss))
            run.epoch_steps += 1
            position.step += 1
            bar.update(batch.target.numel() * task.world.size)
            if not bar.disable and position.step % 20 == 0:
                bar.set_postfix_str(f"loss {run.losses[-1].item():.3f}", refresh=False)
            if task.options.checkpoint and position.step % task.options.save_every == 0:
                synchronize(task.device)
                position.seconds += time.perf_counter() - start
                save()
                start = time.perf_counter()
        synchronize(task.device)
        run.epoch_seconds.append(position.seconds + time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def progress_bar(task: Task, label: str) -> Any:
    """Loss and samples a second of one epoch; silent where stderr is no terminal and in all but the first process."""
    tqdm = require("tqdm").tqdm
    disable = None if task.world.first else True
    return tqdm(total=task.samples, desc=label, unit=f" {task.unit}", unit_scale=True, leave=False, disable=disable)


def save(task: Task, runs: list[Run], position: Position) -> None:
    """Write the checkpoint, if one is asked for."""
    if task.options.checkpoint and task.world.first:
        content = {
            "task": task.name,
            "options": record.options_of(task.options),
            "facts": task.facts(),
            "runs": [run.saved() for run in runs],
            "position": asdict(position),
            "random": checkpoint.random_state(task.device),
        }
        checkpoint.save(task.options.checkpoint, content)


def restore(task: Task, runs: list[Run]) -> Position:
    """Continue where the checkpoint was written."""
    path = task.options.checkpoint
    content = checkpoint.load(path)
    checkpoint.check(path, content, task.name, record.options_of(task.options))
    if content["facts"] != task.facts() or [saved["label"] for saved in content["runs"]] != [run.label for run in runs]:
        raise InputError(f"{path} was begun with other data or modules: name another file.")
    for run, saved in zip(runs, content["runs"], strict=True):
        run.restore(saved)
    position = Position(**content["position"])
    position.state = to_device(position.state, task.device)
    checkpoint.set_random_state(content["random"], task.device)
    if task.world.first:
        print(
            f"Continuing {path} at epoch {position.epoch + 1}, step {position.step + 1} of {runs[position.turn].label}."
        )
    return position


def to_device(state: Any, device: torch.device) -> Any:
    """A carried state: None, a tensor or a tuple of tensors."""
    if isinstance(state, tuple):
        return tuple(part.to(device) for part in state)
    return state if state is None else state.to(device)


def measure(task: Task, run: Run) -> None:
    """After the training: the metric, and what a step spends in the recurrent layer and takes of memory."""
    run.model.eval()
    with torch.no_grad():
        run.metric = task.evaluate(run.model)
    run.model.train()
    if not task.options.compile:  # hooks and counters see only what runs as it is written
        profile(task, run)
    run.model.eval()


def profile(task: Task, run: Run) -> None:
    """On a copy, which may be trained on."""
    model = copy.deepcopy(run.model)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    trial = Run(run.label, model, task.optimizer(model))

    def steps() -> Iterator[Callable[[], Any]]:
        for batch in itertools.islice(task.batches(0), PROFILED_BATCHES):
            yield partial(take_step, task, trial, batch, None)

    run.peak_memory = max(profiling.peak_memory(step, task.device) for step in steps())
    run.layer_share = profiling.layer_share(steps(), model.rnn, task.device)


def largest_gap(runs: list[Run], steps: int | None = None, window: int = 1) -> float:
    """The largest relative difference between two runs' losses of the same step, over the first `steps` or all.

    With a window, between the means of so many steps: a single batch that is known by heart has hardly any loss left
    to compare.
    """
    steps = min([len(run.losses) for run in runs] + ([steps] if steps else []))
    first, second = (run.curve[:steps].unfold(0, min(window, steps), 1).mean(dim=1) for run in runs)
    return ((second - first).abs() / first.abs()).max().item()
