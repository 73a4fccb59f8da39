"""The operator pair, and that of layers with masks, by the operators of csrc/cuda/ops.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import hardware
from seqkernels._ops import ops
from seqkernels.backends.call import RESETS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.cuda.launch import Launch, PassLaunch, launch_of
from seqkernels.late_checks import fitting, fitting_backward


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: list[Tensor],
    h_0: Tensor,  # [L*D, B, P]
    c_0: Tensor | None,  # [L*D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
    launch: Sequence[int] = (),  # by `Launch`, the same for all layers
    layers: int = 1,
    pieces: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tf32, *passes = _planned(launch, cell, x, weights, h_0, layers, pieces=pieces)
    batch_sizes = fitting(x, h_0, batch_sizes)
    return ops.cuda_forward(cell, x, weights, h_0, c_0, batch_sizes, save, bool(tf32), *passes[:3], layers, pieces)


def backward(
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [L*D, B, P]
    grad_c_n: Tensor | None,  # [L*D, B, H]
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P]
    saved: Tensor,
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int] = (),
    layers: int = 1,
    pieces: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    tf32, *passes = _planned(launch, cell, x, weights, h_0, layers, pieces=pieces)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    grads, stack = (grad_y, grad_h_n, grad_c_n), (x, weights, h_0, c_0, batch_sizes)
    options = wants_x, wants_weights, bool(tf32), *passes[3:], layers, pieces
    return ops.cuda_backward(cell, *grads, *stack, y, saved, *options)


# Those of seqkernels.masked_ops.


def masked_forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: list[Tensor],
    h_0: Tensor,  # [D, B, H]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    recurrent: Tensor | None,  # [D, B, H]
    candidate: Tensor | None,  # [D, B, H]
    zoneout_h: Tensor | None,  # [N, D, H]
    zoneout_c: Tensor | None,  # [N, D, H]
    save: bool,
    launch: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, *passes = _planned(launch, cell, x, weights, h_0, 1, masked=True)
    batch_sizes, masks = fitting(x, h_0, batch_sizes), (recurrent, candidate, zoneout_h, zoneout_c)
    return ops.cuda_masked_forward(cell, x, weights, h_0, c_0, batch_sizes, *masks, save, *passes[:3])


def masked_backward(
    cell: str,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    recurrent: Tensor | None,
    candidate: Tensor | None,
    zoneout_h: Tensor | None,
    zoneout_c: Tensor | None,
    y: Tensor,
    saved: Tensor,
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    _, *passes = _planned(launch, cell, x, weights, h_0, 1, masked=True)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    grads, layer = (grad_y, grad_h_n, grad_c_n), (x, weights, h_0, c_0, batch_sizes)
    masks = recurrent, candidate, zoneout_h, zoneout_c
    return ops.cuda_masked_backward(cell, *grads, *layer, *masks, y, saved, wants_x, wants_weights, *passes[3:])


def _planned(
    launch: Sequence[int],
    cell: str,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    layers: int,
    masked: bool = False,
    pieces: Tensor | None = None,
) -> Sequence[int]:
    """What was planned for the call, as `Launch.to_ints` has it; where nothing was, the plan for the sizes that arrive.

    Raises:
        RuntimeError: no CUDA kernels are installed here.
    """
    if hardware.THIS_MACHINE.cuda_missing:
        raise RuntimeError(hardware.THIS_MACHINE.cuda_missing)
    if len(launch) > 1:
        return launch
    known = (
        h_0.dim() == 3 and 0 < layers <= h_0.shape[0] and len(weights) > 1 and weights[0].dim() == 2 and cell in CELLS
    )
    hidden_size = weights[0].shape[0] // CELLS[cell].gates if known else 0
    if not hidden_size:
        return Launch(False, PassLaunch(), PassLaunch()).to_ints()  # the operator says what is wrong
    all_directions, sequences, _ = h_0.shape
    call = Call(
        cell=cell,
        device_type=x.device.type,
        dtype=x.dtype,
        hidden_size=hidden_size,
        projected=len(weights) // all_directions % 2 == 1,
        tf32=x.dtype == torch.float32 and hardware.tf32(x.device),
        directions=all_directions // layers,
        sequences=sequences,
        options=("masks",) if masked else () if pieces is None else (RESETS,),
    )
    return launch_of(call, hardware.gpu_of(x.device)).to_ints()
