"""How the CUDA kernels run a layer: the cheapest of the paths that csrc/cuda/plan.cpp finds to fit, by what a step
costs on each."""

import functools
import math
from typing import Any, NamedTuple

import torch

from seqkernels import hardware
from seqkernels.backends import costs
from seqkernels.backends.call import CUDNN_STEPS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.hardware import GPU


class PassLaunch(NamedTuple):
    """How one pass is launched."""

    path: int = 0  # its number, as csrc/cuda/config.h has them; 0: stepwise
    tile: int = 0  # sequences that a block, a cluster or a group of clusters takes at once
    units: int = 0  # hidden units of a cluster's blocks; of the persistent grid's clusters
    chunks: int = 1  # of the steps, in which layers follow each other as a wavefront; 1: one layer after the other

    def __str__(self) -> str:
        name = path_names()[self.path]
        owner = {"cluster": "block", "persistent grid": "cluster"}.get(name)
        wavefront = f", layers as a wavefront of {self.chunks} chunks" if self.chunks > 1 else ""
        return name + (f" with {self.units} units a {owner}" if owner else "") + wavefront


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
    forward, backward = (of_stack(call, gpu, backward)[0] for backward in (False, True))
    return Launch(call.tf32, forward, backward)


def of_stack(call: Call, gpu: GPU, backward: bool) -> tuple[PassLaunch, float]:
    """How one pass runs all layers, and the microseconds of a step through all of them: one layer after the other, or
    as a wavefront where that takes less by a tenth."""
    launch, us = cheapest(call, gpu, backward)
    us *= call.layers
    known = call.together and 0 < call.steps <= CUDNN_STEPS  # beyond, a class has no upper end
    if not known or call.layout != "padded" or call.directions == 2 or call.options:
        return launch, us
    groups = -(-call.layers // hardware.native().CUDA_STREAMS)
    at_once = -(-call.layers // groups)
    beside = _cheapest_of(call, gpu, backward, at_once) if at_once > 1 else None
    if beside is None:
        return launch, us
    wavefronts = [
        (_wavefront(call, groups, at_once, beside[1], chunks), chunks)
        for chunks in _CHUNKS
        if _workspace(call, at_once, chunks, backward) <= _MAX_WORKSPACE
    ]
    us_of_wavefront, chunks = min(wavefronts, default=(math.inf, 1))
    if us_of_wavefront > 0.9 * us:
        return launch, us
    return beside[0]._replace(chunks=chunks), us_of_wavefront


_SHARING = ("single CTA", "cluster")  # that leave multiprocessors to other layers
_CHUNKS = (2, 4, 8, 16, 32)
_MAX_WORKSPACE = 512 << 20  # bytes of a wavefront, in which every layer under way has its own


def _wavefront(call: Call, groups: int, at_once: int, us: float, chunks: int) -> float:
    """Microseconds of a step through all layers, of which each takes `us`: what the GPU takes, or the host. For as few
    steps as calls of this plan have, as the fewer they are, the less there is to gain."""
    steps = call.steps // 2 + 1
    on_gpu = groups * (chunks + at_once - 1) * (us * steps / chunks + costs.CHUNK)
    return max(on_gpu, call.layers * chunks * costs.HOST_OF_CHUNK) / steps


def _workspace(call: Call, at_once: int, chunks: int, backward: bool) -> float:
    """Bytes, for as many steps as calls of this plan have: what layers pass to each other; backward the gradients of
    all gates, those of h and of x where some differ, and states; forward the input projection of a chunk."""
    gates = call.gates
    blocks = 2 + gates * (2 if CELLS[call.cell].gates_apart else 1) if backward else 1 + gates / chunks
    return at_once * call.steps * call.sequences * blocks * call.hidden_size * call.dtype.itemsize


def cheapest(call: Call, gpu: GPU, backward: bool) -> tuple[PassLaunch, float]:
    """The path of one pass, and the microseconds of a step through one layer."""
    found = _cheapest_of(call, gpu, backward, 1)
    assert found, "stepwise takes everything"
    return found


def _cheapest_of(call: Call, gpu: GPU, backward: bool, at_once: int) -> tuple[PassLaunch, float] | None:
    """The same of one of several layers that run at the same time, if a path leaves room for them."""
    sizes = call.hidden_size, call.projected, call.directions, call.sequences
    tf32 = call.tf32 and not call.options  # one launch with masks multiplies float32 as it is
    dtype = torch.promote_types(call.dtype, torch.float32) if "layer_norm" in call.options else call.dtype
    return _cheapest(call.cell, dtype, tf32, *sizes, call.options, gpu, backward, at_once)


@functools.lru_cache(1024)
def _cheapest(
    cell: str,
    dtype: torch.dtype,
    tf32: bool,
    hidden_size: int,
    projected: bool,
    directions: int,
    sequences: int,
    options: tuple[str, ...],
    gpu: GPU,
    backward: bool,
    at_once: int,
) -> tuple[PassLaunch, float] | None:
    layer = Call(
        cell=cell,
        device_type="cuda",
        dtype=dtype,
        hidden_size=hidden_size,
        projected=projected,
        tf32=tf32,
        directions=directions,
        sequences=sequences,
        options=options,
    )
    paths = path_names()
    share = gpu._replace(
        multiprocessors=gpu.multiprocessors // at_once,
        clusters=tuple(count // at_once for count in gpu.clusters),
    )
    choices = [
        (
            PassLaunch(paths.index(found["path"]), found["tile"], found["units"]),
            costs.cost(terms(found, layer, gpu, backward), gpu),
        )
        for found in candidates(layer, share, backward)
        if not found["reason"] and (at_once == 1 or (found["path"] in _SHARING and found["at_once"]))
    ]
    return min(choices, key=lambda choice: choice[1], default=None)


def candidates(layer: Call, gpu: GPU, backward: bool) -> list[dict[str, Any]]:
    """All ways to run one pass: its "path", the "reason" why it cannot run or "", and its sizes, as `Candidate` in
    csrc/cuda/plan.h explains them."""
    return hardware.native().cuda_candidates(
        cell=layer.cell,
        hidden=layer.hidden_size,
        projected=layer.projected,
        dtype=str(layer.dtype).removeprefix("torch."),
        tf32=layer.tf32,
        directions=layer.directions,
        sequences=layer.sequences,
        target=0 if gpu.amd else int(gpu.target.removeprefix("sm_")),
        shared_memory=gpu.shared_memory,
        multiprocessors=gpu.multiprocessors,
        clusters=gpu.clusters,
        backward=backward,
        masked=bool(set(layer.options) - {"layer_norm"}),
        layer_norm="layer_norm" in layer.options,
    )


def path_names() -> tuple[str, ...]:
    """By their numbers."""
    return hardware.native().CUDA_PATHS


# ---- what a step costs: what it consists of, to be weighed by constants from measurements

_PUSHED = 20  # bytes a clock that peers push to a block (arXiv 2609.01864: one block writes 21 to another)


def terms(found: dict[str, Any], layer: Call, gpu: GPU, backward: bool) -> costs.Terms:
    """Of a step by one of the `candidates`. A block multiplies its part of the weights and reads its shared memory and
    L2; every tile of sequences waits for the one before it where not all run at once."""
    key = f"cuda {found['path']} {'backward' if backward else 'forward'}"
    if found["path"] == "stepwise":
        times = 2.0 if layer.projected else 1.0
        return costs.Terms(key, (times,), costs.step_product(layer, gpu))
    tile, blocks = found["tile"], found["blocks"]
    product = _cta_product(layer, gpu, tile, found["width"])
    of_block = [product, found["shared_weights"] / costs.SHARED]
    if found["path"] == "single CTA":
        of_block.append(found["l2"] / costs.L2)
    elif found["path"] == "cluster":
        of_block.append(_received(layer, tile, backward) / _PUSHED)
    else:
        of_block += _through_l2(layer, tile, blocks, found["cluster"], backward)
    shape = [1.0, layer.gates / 4, math.log2(tile), blocks / gpu.multiprocessors]
    if found["path"] == "single CTA":
        shape.pop()
    elif found["path"] == "cluster":
        tensor_cores = layer.dtype.itemsize == 2 or layer.tf32
        shape.append(float(found["units"].bit_count() > 1))  # with 48 units warps have unequal work
        shape.append(float(found["units"] < 64 and tensor_cores))  # more peers for products that take hardly less
    waves = costs.waves(layer, tile, found["at_once"])
    return costs.Terms(key, tuple(waves * term for term in (*shape, *(clocks / costs.CLOCK for clocks in of_block))))


def _received(layer: Call, sequences: int, backward: bool) -> float:
    """Bytes that a block of a cluster gets of the states of `sequences`, or of their gradients in float32."""
    return sequences * layer.hidden_size * (4 if backward else layer.dtype.itemsize)


def _through_l2(layer: Call, sequences: int, blocks: int, cluster: int, backward: bool) -> list[float]:
    """Clocks of the exchange by `blocks` blocks in clusters of so many. Forward a block reads all states, two
    thirds of what their vectors have. Backward it is pushed the gradients of its cluster's gates; of the states'
    gradients it writes its part, in float32, and reads as much, half of what their vectors have."""
    states = sequences * layer.hidden_size
    if not backward:
        return [1.5 * states * layer.dtype.itemsize / costs.L2]
    pushed = layer.gates * states * layer.dtype.itemsize * cluster / blocks
    return [pushed / _PUSHED, 2 * 2 * 4 * states / cluster / costs.L2]


def _cta_product(layer: Call, gpu: GPU, sequences: int, units: int) -> float:
    """Clocks that one multiprocessor multiplies so many units for a step of so many sequences, at most 8: tensor cores
    always take 8, and without them there is code for 1, 2, 4 and 8."""
    rows = 8 if layer.dtype.itemsize == 2 or layer.tf32 else 1 << (sequences - 1).bit_length()
    return rows * layer.gates * units * layer.hidden_size / costs.multiply_adds(layer, gpu)
