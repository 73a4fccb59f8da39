"""A call, as the choice of a backend sees it: facts alone, and no tensor."""

from typing import NamedTuple

import torch

from seqkernels.backends.cells import CELLS


class Call(NamedTuple):
    """What a plan may depend on. Under torch.compile no size is given, as a plan that reads none puts no guard on
    one."""

    cell: str  # a name in `cells.CELLS`
    device_type: str
    dtype: torch.dtype
    transformed: bool = False  # a torch.func transform other than vmap, or forward-mode AD, is at work
    compiled: bool = False  # by torch.compile
    layers: int = 1  # L
    directions: int = 1  # D
    hidden_size: int = 0  # H; 0: no size is known
    projected: bool = False
    tf32: bool = False  # torch lets recurrent layers round float32 factors to TF32
    input_size: int = 0  # I
    sequences: int = 0  # B
    steps: int = 0  # T, by `class_of_steps`
    layout: str = "padded"  # packed: steps differ in size; device: only the GPU knows how; cell: one step of a cell
    training: bool = False  # gradients are wanted
    cudnn: bool = True  # torch.backends.cudnn.enabled
    deterministic: bool = False  # torch.use_deterministic_algorithms
    capturing: bool = False  # a packed batch, into a CUDA graph
    bfloat16_parts: int = 0  # on a CPU torch lets factors of float32 be sums of so many bfloat16; 0: it does not
    vmapped: bool = False  # torch.vmap is at work, and no other transform
    # What its steps do beside a plain cell's: those of `seqkernels.cell_options`, or RESETS.
    options: tuple[str, ...] = ()
    together: bool = False  # several layers are one call of the operators

    @property
    def gates(self) -> int:
        return CELLS[self.cell].gates

    @property
    def weights(self) -> int:
        """Elements of w_hh, without a projection."""
        return self.gates * self.hidden_size * self.hidden_size


RESETS = "resets"  # go from one piece of a sequence to the next (`seqkernels.resets`)
CUDNN_STEPS = 65535  # that cuDNN takes at most


def class_of_steps(steps: int) -> int:
    """The power of two above, but for what cuDNN does not take: as exact as costs need it, so that calls that differ in
    their steps alone share a plan."""
    return CUDNN_STEPS + 1 if steps > CUDNN_STEPS else min(1 << max(steps - 1, 0).bit_length(), CUDNN_STEPS)


def no_options(call: Call) -> str:
    return f"it has no kernel with {', '.join(call.options)}"


def gpus_have_options(call: Call) -> bool:
    """Whether kernels for GPUs have the options of a call."""
    if call.options == (RESETS,):
        return not call.projected
    others = set(call.options) - {"zoneout", "recurrent_dropout", "candidate_dropout"}
    return others <= {"layer_norm"}


NO_TRANSFORMS = "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
