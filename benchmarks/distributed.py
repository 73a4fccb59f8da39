"""Several processes under `torchrun`: each trains on its share of every batch, and all come to the same weights."""

import os
import time
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from benchmarks import InputError


class World(NamedTuple):
    """This process's number among all of them; one alone where `torchrun` started none."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> tuple[Tensor, float]:
        """This process's rows of a batch, and what its mean loss counts for in the mean over the processes.

        A process for which no row is left takes the first one and counts it for nothing: every process must take
        part in every step.
        """
        mine = rows[self.rank :: self.size]
        weight = len(mine) * self.size / len(rows)
        return (mine if len(mine) else rows[:1]), weight

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size == 1:
            return value
        total = value.clone()
        distributed.all_reduce(total)
        return total / self.size


def join(device: torch.device) -> World:
    """Meet the processes that `torchrun` started with this one: over gloo on the CPU, over NCCL on GPUs."""
    if not distributed.is_torchelastic_launched():
        return World()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(distributed.get_rank(), distributed.get_world_size())


def end() -> None:
    """End the process group."""
    if distributed.is_available() and distributed.is_initialized():
        # gloo's threads let go of their last tensors a moment after the call has returned. If Python has ended by
        # then, the process aborts (github.com/pytorch/pytorch/pull/179291).
        time.sleep(0.2)
        distributed.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device named on the command line; under `torchrun`, "cuda" is the GPU of this process's local rank."""
    if distributed.is_torchelastic_launched():
        if name.startswith("cuda:"):
            raise InputError(f"--device {name} is one GPU for all processes; --device cuda gives each its own.")
        if name == "cuda":
            name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("the tasks run on cpu and cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}.") from error
    return device


def several_processes(model: nn.Module) -> nn.Module:
    """The model with its gradients averaged over all processes (DistributedDataParallel)."""
    return nn.parallel.DistributedDataParallel(model)


def several_devices(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every batch cut over this machine's GPUs (DataParallel); on one device, the model itself.

    Raises:
        InputError: a GPU other than the first: DataParallel starts from that one.
    """
    devices = torch.cuda.device_count()
    if device.type != "cuda" or devices < 2:
        where = "one GPU" if devices and device.type == "cuda" else "no GPU"
        print(f"--data-parallel: {where} in use, so the batch stays whole.")
        return model
    if device.index:
        raise InputError(f"--data-parallel starts from the first GPU, not from {device}: use --device cuda.")
    print(f"--data-parallel: every batch is cut over {devices} GPUs.")
    return nn.DataParallel(model)
