"""A training task: its data, model, loss and metric, for the loop in train.py; and a run of it, by one module."""

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import distributed
from benchmarks.distributed import World
from benchmarks.options import natural, positive, positive_float, thread_count

MODULES = {"torch": "torch.nn", "seqkernels": "seqkernels"}
DTYPES = ("float32", "float64", "bfloat16", "float16")
POOL = 50  # batches


class Batch(NamedTuple):
    """What one training step sees."""

    input: Any
    target: Tensor
    weight: float = 1.0  # of this process's mean loss in the mean over all processes


class Task(ABC):
    """What one task brings to the shared loop. `__init__` loads data; `InputError` says that they cannot be used."""

    name: str
    metric: str
    unit: str
    cell = "GRU"  # which of torch.nn's recurrent modules is compared with ours
    shards_batches = False  # whether `torchrun` can divide its batches
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
    wrapped: nn.Module | None = None  # the model as the steps call it, if not itself: compiled, or over several devices
    losses: list[Tensor] = field(default_factory=list)  # one a step, also of an epoch that was cut short
    epoch_steps: int = 0
    epoch_seconds: list[float] = field(default_factory=list)  # of whole epochs
    layer_share: float = math.nan  # of a step's time, spent in the recurrent layer
    peak_memory: float = math.nan  # bytes of one step
    metric: float = math.nan
    quantized_metric: float = math.nan  # of a copy whose recurrent layers are quantized to int8
    plan: str | None = None  # which of seqkernels' backends runs, and why

    @property
    def called(self) -> nn.Module:
        return self.model if self.wrapped is None else self.wrapped

    @property
    def rnn(self) -> nn.Module:
        """The recurrent layer that the task compares."""
        return self.model.get_submodule("rnn")

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
    parser.add_argument(
        "--quantized", action="store_true", help="afterwards, the metric with ours quantized to int8 as well (on a CPU)"
    )
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


def sent(batch: Any, device: torch.device) -> Any:
    """A tensor or PackedSequence of the host, on the device. From pinned memory: any other copy waits until the GPU has
    done all that was asked of it before, and the host would fall behind in every step."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy, of scores in 16 bits in float32."""
    return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), target)
