"""The operator pair by CUDA kernels (csrc/cuda): NVIDIA GPUs, in every dtype.

Four paths: *single CTA*, one launch in which a block of threads takes up to 8 sequences through all steps with the
recurrent weights in its registers and shared memory; *cluster*, the same by up to 16 blocks that share the hidden units
and push new states to each other; *persistent grid*, the same by as many blocks as run at the same time, which exchange
through the L2 cache; and *stepwise*, for each step a cuBLAS product and a kernel. Nothing waits for the GPU, so all of
them can be captured in a CUDA graph.

float32 products follow torch's switches: those inside the kernels torch.backends.cudnn.rnn, as nn.GRU's do; those that
cuBLAS multiplies torch.backends.cuda.matmul.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels import hardware
from seqkernels.backends import costs
from seqkernels.backends.call import NO_TRANSFORMS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.precision import NATIVE_DTYPES
from seqkernels.hardware import GPU, INTERPRETED, CudaBuild, Machine

DESCRIPTION = "compiled kernels for NVIDIA GPUs"
PATHS = ("stepwise", "single CTA", "cluster", "persistent grid")  # by their numbers in a launch


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type != ("cpu" if machine.emulator else "cuda"):
        return f"the tensors are on {call.device_type}"
    if machine.cuda_missing:
        return machine.cuda_missing
    if call.dtype not in NATIVE_DTYPES:
        return f"no CUDA kernel for {call.dtype}"
    if call.transformed:
        return NO_TRANSFORMS
    return _reason_against_code(machine.cuda_build, machine.gpu) if machine.gpu else None


def _reason_against_code(build: CudaBuild, gpu: GPU) -> str | None:
    """Why nothing that was built runs on `gpu`."""
    if gpu.amd:
        return f"{gpu.name} does not run CUDA"
    running = [target for target in build.targets if _runs(target, gpu)]
    if not running:
        return (
            f"the CUDA kernels here are built for {', '.join(build.targets)}, none of which {gpu.name} ({gpu.target}) "
            "runs. Remedy: build them with TORCH_CUDA_ARCH_LIST naming it"
        )
    # Machine code needs a driver for its major version of CUDA, PTX one that is no older than nvcc.
    needed = (build.nvcc[0], 0) if any(target.startswith("sm_") for target in running) else build.nvcc
    if gpu.driver and gpu.driver < needed:
        return (
            f"the CUDA kernels here need a driver for CUDA {needed[0]}.{needed[1]}, and this one is for "
            f"{gpu.driver[0]}.{gpu.driver[1]}. Remedy: a newer driver, or build them with an older nvcc"
        )
    return None


def _runs(target: str, gpu: GPU) -> bool:
    """Whether `gpu` runs code for `target`: machine code that of its generation, and no newer than it is, PTX all that
    is no newer; with an a at the end that of its own alone, with an f its generation's."""
    kind, _, number = target.partition("_")
    built, own = int(number.rstrip("af")), int(gpu.target.removeprefix("sm_"))
    if number.endswith("a"):
        return built == own
    return built <= own and (built // 10 == own // 10 or (kind == "compute" and not number.endswith("f")))


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return "CUDA kernels run on the CPU for those who name them: backend='cuda'" if machine.emulator else None


def estimate(call: Call, machine: Machine) -> float | None:
    gpu = machine.gpu
    if call.device_type != "cuda" or gpu is None or not call.hidden_size:
        return None
    passes = (False, True) if call.training else (False,)
    return call.layers * sum(_path_of_call(call, gpu, backward)[1] for backward in passes)


def kernel(call: Call, machine: Machine) -> str:
    if not call.hidden_size:
        return ""
    forward, backward = (_path_of_call(call, machine.gpu or INTERPRETED, backward)[0] for backward in (False, True))
    return str(forward) if str(forward) == str(backward) else f"forward {forward}, backward {backward}"


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    """TF32, then forward and backward the path's number, its tile and its units."""
    if not call.hidden_size:
        return ()
    launch = [int(call.tf32)]
    for backward in (False, True):
        chosen, _ = _path_of_call(call, machine.gpu or INTERPRETED, backward)
        launch += [PATHS.index(chosen.name), chosen.tile, chosen.units]
    return tuple(launch)


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: list[Tensor],
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
    launch: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    told = _path(cell, x, weights, h_0, launch, backward=False)
    return torch.ops.seqkernels.cuda_forward(cell, x, weights, h_0, c_0, batch_sizes, save, *told)


def backward(
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [D, B, P]
    grad_c_n: Tensor | None,  # [D, B, H]
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P]
    saved: Tensor,  # [N, D, K*H]
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    told = _path(cell, x, weights, h_0, launch, backward=True)
    return torch.ops.seqkernels.cuda_backward(
        cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, *told
    )


def _path(cell: str, x: Tensor, weights: list[Tensor], h_0: Tensor, launch: Sequence[int], backward: bool) -> tuple:
    """Whether float32 factors may be rounded to TF32, and the path: what was planned, or by the sizes that arrive."""
    gpu = hardware.gpu_of(x.device)
    if not launch:
        known = h_0.dim() == 3 and len(weights) > 1 and weights[0].dim() == 2 and cell in CELLS
        hidden_size = weights[0].shape[0] // CELLS[cell].gates if known else 0
        if not hidden_size or not h_0.shape[0]:
            return False, 0, 0, 0  # the operator says what is wrong
        call = Call(
            cell=cell,
            device_type=x.device.type,
            dtype=x.dtype,
            hidden_size=hidden_size,
            projected=len(weights) // h_0.shape[0] % 2 == 1,
            tf32=x.dtype == torch.float32 and hardware.tf32(x.device),
            directions=h_0.shape[0],
            sequences=h_0.shape[1],
        )
        launch = plan_launch(call, Machine(gpu=gpu))
    return bool(launch[0]), *(launch[4:7] if backward else launch[1:4])


class Residency(NamedTuple):
    """Where the recurrent weights of a block lie, in bytes. What it reads from the L2 cache it reads in every step."""

    registers: int
    shared_memory: int
    l2: int


SEQUENCES = 8  # that a block takes at most: what the matrix cores multiply at once


def single_cta(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> bool:
    """Whether there is a kernel for a layer's sweep in one launch, a block taking its sequences through all steps."""
    if projected or gpu.amd or int(gpu.target.removeprefix("sm_")) < 80:
        return False
    return _width(hidden_size, dtype) > 0 and _buffers(cell, hidden_size, dtype, backward) <= gpu.shared_memory


def residency(cell: str, hidden_size: int, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool) -> Residency:
    """Where a single CTA has its weights. csrc/cuda/single_cta.cu and product.h say the same."""
    gates, width = CELLS[cell].gates, _width(hidden_size, dtype)
    blocks = 2 if width > 128 else 1
    groups, group = width * dtype.itemsize // 64 * blocks, gates * width // blocks * 64
    held = min(groups, _held(gates, width, dtype, tf32, backward, hidden_size % 2 == 0))
    left = gpu.shared_memory - _buffers(cell, hidden_size, dtype, backward)
    shared = min(groups - held, left // group)
    return Residency(held * group, shared * group, (groups - held - shared) * group)


def _width(hidden_size: int, dtype: torch.dtype) -> int:
    """Hidden units that the kernel for a layer is made for; 0: there is none."""
    widest = {2: 256, 4: 128}.get(dtype.itemsize, 0)
    widths = (64, 128, 256) if hidden_size % 2 else (32, 64, 96, 128, 192, 256)
    return next((width for width in widths if hidden_size <= width <= widest), 0)


def _buffers(cell: str, hidden_size: int, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of shared memory for two buffers of what 8 sequences exchange: states, or gradients of gates. Rows begin
    half of what shared memory gives at once, 128 bytes, apart."""
    factors = _width(hidden_size, dtype) * (CELLS[cell].gates if backward else 1)
    row = factors * dtype.itemsize
    return 2 * SEQUENCES * (row + (64 if row % 128 == 0 else 0))


def _held(gates: int, width: int, dtype: torch.dtype, tf32: bool, backward: bool, even: bool) -> int:
    """Groups of fragments (32 bytes of each thread and gate) that threads hold in registers."""
    if gates == 1:
        return 16
    if dtype.itemsize == 4 and not tf32:
        if gates == 4:
            return (3 if width > 64 and even else 2) if backward else 1
        return 4 if backward else 3
    if dtype.itemsize == 4:
        return (3 if backward else 4) if gates == 4 else 5 if backward else 6
    if width <= 128:
        return 4
    return (2 if backward or not even else 4) if gates == 4 else 4 if backward else 5


class Group(NamedTuple):
    """Blocks that share the hidden units of a layer and exchange in every step."""

    blocks: int
    units: int  # of a block; on the persistent grid of one of its clusters
    weights: int  # bytes of a block's shared memory for weights,
    memory: int  # and all of them
    at_once: int  # groups that run at the same time


def clusters(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> tuple[list[Group], str]:
    """The clusters that can take a layer, those of most blocks first; if there are none, why."""
    against = _reason_against_groups(projected, dtype, gpu)
    if against:
        return [], against
    gates, fits = CELLS[cell].gates, []
    for units in (32, 48, 64):
        blocks = -(-hidden_size // units)
        weights, memory = _memory_of_slice(gates, hidden_size, blocks, units, 0, dtype, tf32, backward)
        if 2 <= blocks <= 16 and memory <= gpu.shared_memory:
            fits.append(Group(blocks, units, weights, memory, gpu.clusters_of(blocks)))
    able = [found for found in fits if found.at_once]
    if able:
        return able, ""
    if fits:
        return [], f"{gpu.name} runs no cluster of {' or '.join(str(found.blocks) for found in fits)} blocks"
    if hidden_size <= 32:
        return [], f"a cluster of one block, which {hidden_size} hidden units would be, is none"
    return [], f"no 16 blocks hold the weights of {hidden_size} hidden units of {gates} gates in {dtype}"


UNITS = 16  # hidden units of a block of the persistent grid


def persistent_grid(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> tuple[list[Group], str]:
    """The groups of blocks that can take a layer, as clusters of 4 blocks and of 2; if there are none, why."""
    against = _reason_against_groups(projected, dtype, gpu)
    if against:
        return [], against
    gates, fits = CELLS[cell].gates, []
    for cluster in (4, 2):
        units = cluster * UNITS
        blocks = -(-hidden_size // units) * cluster
        weights, memory = _memory_of_slice(gates, hidden_size, blocks, UNITS, cluster, dtype, tf32, backward)
        if blocks and memory <= gpu.shared_memory:
            at_once = gpu.clusters_of(cluster) * cluster // blocks
            fits.append(Group(blocks, units, weights, memory, at_once))
    able = [found for found in fits if found.at_once]
    if able:
        return able, ""
    if fits:
        needed = " or ".join(f"{found.blocks} blocks in clusters of {found.units // UNITS}" for found in fits)
        return [], f"{gpu.name} does not run {needed} at the same time"
    return [], f"blocks of {UNITS} hidden units do not hold the weights of {hidden_size}, {gates} gates in {dtype}"


def _reason_against_groups(projected: bool, dtype: torch.dtype, gpu: GPU) -> str:
    if gpu.target != "sm_90":
        return f"clusters are for compute capability 9.0, {gpu.name} has {gpu.target}"
    if projected:
        return "no kernel for several blocks takes a projection"
    return "no kernel for several blocks takes float64" if dtype == torch.float64 else ""


def _memory_of_slice(
    gates: int, hidden_size: int, blocks: int, units: int, cluster: int, dtype: torch.dtype, tf32: bool, backward: bool
) -> tuple[int, int]:
    """Bytes of shared memory of a block, one of `blocks` with `units` hidden units each: of the weights that its
    registers do not hold, and all, with two mbarriers, two buffers of what the product multiplies, and what threads or
    blocks exchange. csrc/cuda/slice.h says the same; on the persistent grid, by clusters of so many blocks,
    persistent_grid.h, and where all blocks are one cluster (0) cluster.h."""
    chunk = 64 // dtype.itemsize
    if backward:
        # Units whose gates' gradients a block multiplies at once, how many times, and for how many states.
        of_units, sets, states = (
            (2 * units, cluster // 2, blocks // cluster * units) if cluster else (units, 1, hidden_size)
        )
        warps, chunks = 8, sets * -(-gates * of_units // chunk)
        exchanged = 3 * SEQUENCES * units * 4 if cluster else 2 * blocks * SEQUENCES * units * 4
        fragments = 2 * chunks * -(-states // (32 * warps))
    else:
        warps, chunks = 6 if units == 48 else 8, -(-blocks * units // chunk)
        parts = warps * 16 // units
        exchanged = parts * gates * SEQUENCES * (units + 4) * 4 - 16
        fragments = gates * -(-hidden_size // (chunk * parts))
    factors = 2 * SEQUENCES * 64 * (chunks + (chunks + 1) % 2)
    held = (_held_on_persistent_grid if cluster else _held_in_cluster)(gates, dtype, tf32, backward)
    weights = max(0, fragments - held) * warps * 32 * 32
    return weights, 16 + factors + exchanged + weights


def _held_in_cluster(gates: int, dtype: torch.dtype, tf32: bool, backward: bool) -> int:
    """Fragments of the weights that threads hold in registers, as in csrc/cuda/cluster.cu."""
    if dtype.itemsize == 4 and not tf32:
        return {1: 12, 3: 11, 4: 11}[gates] if backward else {1: 17, 3: 12, 4: 10}[gates]
    return 22 if gates == 1 and not backward else 18


def _held_on_persistent_grid(gates: int, dtype: torch.dtype, tf32: bool, backward: bool) -> int:
    """The same, as in csrc/cuda/persistent_grid.cu."""
    if dtype.itemsize == 4 and not tf32:
        return {1: 12, 3: 9, 4: 8}[gates] if backward else {1: 17, 3: 10, 4: 8}[gates]
    if dtype.itemsize == 4 and backward:
        return 16 if gates == 4 else 17
    return 22 if gates == 1 and not backward else 18


class Path(NamedTuple):
    """How the CUDA backend sweeps a layer."""

    name: str = "stepwise"  # or single CTA, cluster, persistent grid
    tile: int = 0  # sequences that a block, a cluster or a group of clusters takes at once
    units: int = 0  # hidden units of a cluster's blocks; of the persistent grid's clusters

    def __str__(self) -> str:
        of = {"cluster": "block", "persistent grid": "cluster"}
        return self.name + (f" with {self.units} units a {of[self.name]}" if self.units else "")


@functools.lru_cache(1024)
def path(
    cell: str,
    hidden_size: int,
    projected: bool,
    dtype: torch.dtype,
    tf32: bool,
    gpu: GPU,
    backward: bool,
    directions: int,
    sequences: int,
) -> tuple[Path, float]:
    facts = cell, hidden_size, projected, dtype, tf32, gpu, backward
    layer = Call(
        cell, gpu.target, dtype, hidden_size=hidden_size, projected=projected, tf32=tf32, directions=directions,
        sequences=sequences,
    )  # fmt: skip
    paths = [(Path(), cost_of_stepwise(layer, gpu))]
    if single_cta(*facts):
        _, shared, l2 = residency(cell, hidden_size, dtype, tf32, gpu, backward)
        tile = sequences_of_tile(directions, sequences, gpu.multiprocessors)
        cost = cost_of_single_cta(layer, gpu, shared, l2, tile)
        paths.append((Path("single CTA", tile), cost))
    for found in clusters(*facts)[0]:
        tile = sequences_of_tile(directions, sequences, found.at_once)
        cost = cost_of_cluster(layer, gpu, found.blocks, found.weights, tile, found.at_once, backward)
        paths.append((Path("cluster", tile, found.units), cost))
    for found in persistent_grid(*facts)[0]:
        # As many for either direction; or if not even one for each, one direction after the other.
        at_once = found.at_once - found.at_once % directions or found.at_once
        tile = sequences_of_tile(directions, sequences, at_once)
        cluster = found.units // UNITS
        cost = cost_of_persistent_grid(layer, gpu, found.blocks, cluster, found.weights, tile, at_once, backward)
        paths.append((Path("persistent grid", tile, found.units), cost))
    return min(paths, key=lambda one: one[1])


def _path_of_call(call: Call, gpu: GPU, backward: bool) -> tuple[Path, float]:
    """The quickest path of one pass, and the microseconds of a step on it."""
    layer = call.cell, call.hidden_size, call.projected, call.dtype, call.tf32, gpu, backward
    return path(*layer, call.directions, call.sequences)


def sequences_of_tile(directions: int, sequences: int, at_once: int) -> int:
    """As few as let the tiles of all directions run at once: a step lasts the longer, the more there is to read and
    write."""
    most = max(1, min(SEQUENCES, sequences))
    return next((tile for tile in range(1, most) if directions * -(-sequences // tile) <= at_once), most)


# What the stepwise path adds to each step: an operator through torch's dispatcher takes 4 us (measured on a CPU).
_THROUGH_TORCH = 4.0
# Clocks of a step in one block besides products: two barriers of 16 warps, and the latency of shared memory, of the
# matrix cores' chain and of the activations.
_LATENCY = 400
# Clocks of an exchange between the blocks of a cluster besides its bytes, and bytes a clock that peers push to a block:
# remote shared memory answers after 180 to 213 clocks (arXiv 2402.13499), the rest is for the mbarrier; one block
# writes 21 bytes a clock to another (arXiv 2609.01864).
_EXCHANGE, _PUSHED = 300, 20
# Clocks of an exchange through L2 besides its bytes: from one multiprocessor's write to another's read 956 to 1,110
# (H800; arXiv 2402.13499, 2501.12084). So much come to, in parts, what L2 answers after (258 near, 470 far; Chips and
# Cheese) until the data are there, a flag's way (160 ns), and another answer until they are read.
_THROUGH_L2 = 1000


def cost_of_single_cta(layer: Call, gpu: GPU, shared_memory: int, l2: int, sequences: int) -> float:
    """A block walks `sequences` through all steps, and in each reads the weights that its registers do not hold, so
    many bytes from shared memory and so many from L2."""
    read = shared_memory / costs.SHARED + l2 / costs.L2
    clocks = _LATENCY + max(read, _cta_product(layer, gpu, sequences))
    return costs.rounds(layer, sequences, gpu.multiprocessors) * clocks / costs.CLOCK


def cost_of_cluster(
    layer: Call, gpu: GPU, blocks: int, shared_memory: int, sequences: int, at_once: int, backward: bool
) -> float:
    """Each of `blocks` blocks has a part of the weights, so many bytes of it in shared memory; what it gets from its
    peers in a step are the states of `sequences`, or their gradients in float32."""
    got = sequences * layer.hidden_size * (4 if backward else layer.dtype.itemsize)
    clocks = max(shared_memory / costs.SHARED, _cta_product(layer, gpu, sequences) / blocks)
    return costs.rounds(layer, sequences, at_once) * (_LATENCY + _EXCHANGE + got / _PUSHED + clocks) / costs.CLOCK


def cost_of_persistent_grid(
    layer: Call,
    gpu: GPU,
    blocks: int,
    cluster: int,
    shared_memory: int,
    sequences: int,
    at_once: int,
    backward: bool,
) -> float:
    """The same by groups of `blocks` blocks, in clusters of so many, which exchange through L2. Forward a block reads
    the states of `sequences` for its cluster, each a part of them, but all come to its shared memory. Backward it is
    pushed the gradients of its cluster's gates; of the states' gradients it writes its part, in float32, and reads as
    much."""
    states = sequences * layer.hidden_size
    if backward:
        pushed = layer.gates * states * layer.dtype.itemsize * cluster / blocks
        exchange = _EXCHANGE + pushed / _PUSHED + _THROUGH_L2 + 2 * 4 * states / cluster / costs.L2
    else:
        exchange = _THROUGH_L2 + states * layer.dtype.itemsize / costs.L2
    clocks = max(shared_memory / costs.SHARED, _cta_product(layer, gpu, sequences) / blocks)
    return costs.rounds(layer, sequences, at_once) * (_LATENCY + exchange + clocks) / costs.CLOCK


def cost_of_stepwise(layer: Call, gpu: GPU) -> float:
    """A cuBLAS product and a kernel a step, twice where h is projected."""
    return (2 if layer.projected else 1) * (2 * costs.LAUNCH + _THROUGH_TORCH) + costs.step_product(layer, gpu)


def _cta_product(layer: Call, gpu: GPU, sequences: int) -> float:
    """Clocks that one multiprocessor would multiply for a step of so many sequences, at most 8: tensor cores always
    take 8, and without them there is code for 1, 2, 4 and 8."""
    rows = 8 if layer.dtype.itemsize == 2 or layer.tf32 else 1 << (sequences - 1).bit_length()
    return rows * layer.weights / costs.multiply_adds(layer, gpu)
