"""How the CUDA kernels run a layer: the cheapest of the paths that csrc/cuda/plan.cpp finds to fit, by what a step
costs on each."""

import functools
import importlib
from typing import Any, NamedTuple

import torch

from seqkernels.backends import costs
from seqkernels.backends.call import Call
from seqkernels.hardware import GPU


class PassLaunch(NamedTuple):
    """How one pass is launched."""

    path: int = 0  # its number, as csrc/cuda/config.h has them; 0: stepwise
    tile: int = 0  # sequences that a block, a cluster or a group of clusters takes at once
    units: int = 0  # hidden units of a cluster's blocks; of the persistent grid's clusters

    def __str__(self) -> str:
        name = path_names()[self.path]
        owner = {"cluster": "block", "persistent grid": "cluster"}.get(name)
        return name + (f" with {self.units} units a {owner}" if owner else "")


class Launch(NamedTuple):
    """How a call is launched."""

    tf32: bool  # float32 factors may be rounded to TF32
    forward: PassLaunch
    backward: PassLaunch

    def to_ints(self) -> tuple[int, ...]:
        return int(self.tf32), *self.forward, *self.backward

    def __str__(self) -> str:
        forward, backward = str(self.forward), str(self.backward)
        return forward if forward == backward else f"forward {forward}, backward {backward}"


def launch_of(call: Call, gpu: GPU) -> Launch:
    """The cheapest one; the call has its sizes."""
    forward, backward = (cheapest(call, gpu, backward)[0] for backward in (False, True))
    return Launch(call.tf32, forward, backward)


def cheapest(call: Call, gpu: GPU, backward: bool) -> tuple[PassLaunch, float]:
    """The path of one pass, and the microseconds of a step on it."""
    sizes = call.hidden_size, call.projected, call.directions, call.sequences
    return _cheapest(call.cell, call.dtype, call.tf32, *sizes, gpu, backward)


@functools.lru_cache(1024)
def _cheapest(
    cell: str,
    dtype: torch.dtype,
    tf32: bool,
    hidden_size: int,
    projected: bool,
    directions: int,
    sequences: int,
    gpu: GPU,
    backward: bool,
) -> tuple[PassLaunch, float]:
    layer = Call(
        cell=cell,
        device_type="cuda",
        dtype=dtype,
        hidden_size=hidden_size,
        projected=projected,
        tf32=tf32,
        directions=directions,
        sequences=sequences,
    )
    paths = path_names()
    choices = [
        (PassLaunch(paths.index(found["path"]), found["tile"], found["units"]), _cost(found, layer, gpu, backward))
        for found in candidates(layer, gpu, backward)
        if not found["reason"]
    ]
    return min(choices, key=lambda choice: choice[1])


def candidates(layer: Call, gpu: GPU, backward: bool) -> list[dict[str, Any]]:
    """All ways to run one pass: its "path", the "reason" why it cannot run or "", and its sizes, as `Candidate` in
    csrc/cuda/plan.h explains them."""
    dtype, target = str(layer.dtype).removeprefix("torch."), 0 if gpu.amd else int(gpu.target.removeprefix("sm_"))
    facts = layer.cell, layer.hidden_size, layer.projected, dtype, layer.tf32, layer.directions, layer.sequences
    machine = target, gpu.shared_memory, gpu.multiprocessors, gpu.clusters
    return _native().cuda_candidates(*facts, *machine, backward)


def path_names() -> tuple[str, ...]:
    """By their numbers."""
    return _native().CUDA_PATHS


def _native() -> Any:
    return importlib.import_module("seqkernels._C")


# ---- what a step costs, in microseconds

# What the stepwise path adds to each step: an operator through torch's dispatcher takes 4 us (measured on a CPU).
_THROUGH_TORCH = 4.0
# Clocks of a step in one block besides products: two barriers of 16 warps, and the latency of shared memory, of the
# tensor cores' chain and of the activations.
_LATENCY = 400
# Clocks of an exchange between the blocks of a cluster besides its bytes, and bytes a clock that peers push to a block:
# remote shared memory answers after 180 to 213 clocks (arXiv 2402.13499), the rest is for the mbarrier; one block
# writes 21 bytes a clock to another (arXiv 2609.01864).
_EXCHANGE, _PUSHED = 300, 20
# Clocks of an exchange through L2 besides its bytes: from one multiprocessor's write to another's read 956 to 1,110
# (H800; arXiv 2402.13499, 2501.12084). So much come to, in parts, what L2 answers after (258 near, 470 far; Chips and
# Cheese) until the data are there, a flag's way (160 ns), and another answer until they are read.
_THROUGH_L2 = 1000


def _cost(found: dict[str, Any], layer: Call, gpu: GPU, backward: bool) -> float:
    if found["path"] == "stepwise":
        return _stepwise(layer, gpu)
    # Clocks of a block: it multiplies its part of the weights while it reads those that its registers do not hold.
    read = found["shared_memory"] / costs.SHARED + found["l2"] / costs.L2
    product = max(read, _cta_product(layer, gpu, found["tile"]) / found["blocks"])
    exchange = 0.0
    if found["path"] == "cluster":
        exchange = _cluster_exchange(layer, found["tile"], backward)
    elif found["path"] == "persistent grid":
        exchange = _grid_exchange(layer, found["tile"], found["blocks"], found["cluster"], backward)
    return costs.rounds(layer, found["tile"], found["at_once"]) * (_LATENCY + exchange + product) / costs.CLOCK


def _stepwise(layer: Call, gpu: GPU) -> float:
    """A cuBLAS product and a kernel a step, twice where h is projected."""
    return (2 if layer.projected else 1) * (2 * costs.LAUNCH + _THROUGH_TORCH) + costs.step_product(layer, gpu)


def _cluster_exchange(layer: Call, sequences: int, backward: bool) -> float:
    """Clocks until a block has from its peers the states of `sequences`, or their gradients in float32."""
    received = sequences * layer.hidden_size * (4 if backward else layer.dtype.itemsize)
    return _EXCHANGE + received / _PUSHED


def _grid_exchange(layer: Call, sequences: int, blocks: int, cluster: int, backward: bool) -> float:
    """The same through L2, by `blocks` blocks in clusters of so many. Forward a block reads the states of `sequences`
    for its cluster, each a part of them, but all come to its shared memory. Backward it is pushed the gradients of its
    cluster's gates; of the states' gradients it writes its part, in float32, and reads as much."""
    states = sequences * layer.hidden_size
    if not backward:
        return _THROUGH_L2 + states * layer.dtype.itemsize / costs.L2
    pushed = layer.gates * states * layer.dtype.itemsize * cluster / blocks
    return _EXCHANGE + pushed / _PUSHED + _THROUGH_L2 + 2 * 4 * states / cluster / costs.L2


def _cta_product(layer: Call, gpu: GPU, sequences: int) -> float:
    """Clocks that one multiprocessor would multiply for a step of so many sequences, at most 8: tensor cores always
    take 8, and without them there is code for 1, 2, 4 and 8."""
    rows = 8 if layer.dtype.itemsize == 2 or layer.tf32 else 1 << (sequences - 1).bit_length()
    return rows * layer.weights / costs.multiply_adds(layer, gpu)
