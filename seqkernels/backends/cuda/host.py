"""The operator pair, and those of layers with masks and with layer norm, by the operators of csrc/cuda/ops.cpp and
csrc/cuda/ops_layer_norm.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import hardware
from seqkernels._ops import ops
from seqkernels.backends.call import RESETS, Call, class_of_steps
from seqkernels.backends.cells import CELLS
from seqkernels.backends.cuda.launch import Launch, PassLaunch, launch_of
from seqkernels.backends.side_by_side import sequences_of
from seqkernels.late_checks import fitting, fitting_backward

# Whether float32 may be rounded to TF32; path, tile, units and chunks forward, and backward.
Passes = tuple[bool | int, Sequence[int], Sequence[int]]


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
    tf32, forward, _ = _planned(launch, cell, x, weights, h_0, layers, batch_sizes, pieces)
    batch_sizes = fitting(x, h_0, batch_sizes)
    return ops.cuda_forward(cell, x, weights, h_0, c_0, batch_sizes, save, bool(tf32), *forward, layers, pieces)


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
    tf32, _, backward = _planned(launch, cell, x, weights, h_0, layers, batch_sizes, pieces)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    grads, stack = (grad_y, grad_h_n, grad_c_n), (x, weights, h_0, c_0, batch_sizes)
    options = wants_x, wants_weights, bool(tf32), *backward, layers, pieces
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
    _, forward, _ = _planned(launch, cell, x, weights, h_0, 1, masked=True)
    batch_sizes, masks = fitting(x, h_0, batch_sizes), (recurrent, candidate, zoneout_h, zoneout_c)
    return ops.cuda_masked_forward(cell, x, weights, h_0, c_0, batch_sizes, *masks, save, *forward[:3])


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
    _, _, backward = _planned(launch, cell, x, weights, h_0, 1, masked=True)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    grads, layer = (grad_y, grad_h_n, grad_c_n), (x, weights, h_0, c_0, batch_sizes)
    masks = recurrent, candidate, zoneout_h, zoneout_c
    return ops.cuda_masked_backward(cell, *grads, *layer, *masks, y, saved, wants_x, wants_weights, *backward[:3])


# Those of seqkernels.layer_norm_ops.


def layer_norm_forward(cell: str, *rest) -> tuple[Tensor, ...]:
    *of_layer, save, launch = rest
    layer, (_, forward, _) = _layer_with_norms(launch, cell, *of_layer)
    return ops.cuda_layer_norm_forward(cell, *layer, save, forward[:3])


def layer_norm_sweep_back(cell: str, grad_y, grad_h_n, grad_c_n, *rest) -> tuple[Tensor, ...]:
    """The sweep alone, as of ``layer_norm_sweep_back``."""
    *of_layer, y, saved, statistics, launch = rest
    layer, (_, _, backward) = _layer_with_norms(launch, cell, *of_layer)
    grads, kept = (grad_y, grad_h_n, grad_c_n), (y, saved, statistics)
    return ops.cuda_layer_norm_sweep_back(cell, *grads, *layer, *kept, backward[:3])


def _layer_with_norms(
    launch: Sequence[int], cell: str, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes, *rest
) -> tuple[tuple, Passes]:
    """Arguments of both passes, with batch sizes that fit, and how the passes are launched."""
    _expect_kernels()
    if len(launch) > 1:
        planned = _passes(launch)
    else:
        hidden_size = h_0.shape[2] if h_0.dim() == 3 and h_0.shape[0] and cell in CELLS else 0
        planned = _plan(cell, gates_x, h_0, hidden_size, options=("layer_norm",))
    parameters, batch_sizes = (w_hh, scale, shift, scale_c, shift_c), fitting(gates_x, h_0, batch_sizes)
    return (gates_x, *parameters, h_0, c_0, batch_sizes, *rest), planned


def _passes(launch: Sequence[int]) -> Passes:
    """Of `Launch.to_ints`."""
    each = len(PassLaunch._fields)
    return launch[0], launch[1 : 1 + each], launch[1 + each :]


def _planned(
    launch: Sequence[int],
    cell: str,
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    layers: int,
    batch_sizes: Tensor | None = None,
    pieces: Tensor | None = None,
    masked: bool = False,
) -> Passes:
    """What was planned for the call; where nothing was, the plan for the sizes that arrive.

    Raises:
        RuntimeError: no CUDA kernels are installed here.
    """
    _expect_kernels()
    if len(launch) > 1:
        return _passes(launch)
    known = h_0.dim() == 3 and 0 < layers <= h_0.shape[0] and cell in CELLS
    known = known and x.dim() == 2 and len(weights) > 1 and weights[0].dim() == 2
    if not known:
        return _plan(cell, x, h_0, 0)
    projected = len(weights) // h_0.shape[0] % 2 == 1
    options = ("masks",) if masked else () if pieces is None else (RESETS,)
    hidden_size, sequences = weights[0].shape[0] // CELLS[cell].gates, sequences_of(h_0, batch_sizes, pieces)
    padded = batch_sizes is None and pieces is None
    return _plan(cell, x, h_0, hidden_size, projected, layers, options, sequences, padded)


def _expect_kernels() -> None:
    if hardware.THIS_MACHINE.cuda_missing:
        raise RuntimeError(hardware.THIS_MACHINE.cuda_missing)


def _plan(
    cell: str,
    x: Tensor,
    h_0: Tensor,
    hidden_size: int,
    projected: bool = False,
    layers: int = 1,
    options: tuple[str, ...] = (),
    sequences: int | None = None,  # None: as many as states
    padded: bool = False,
) -> Passes:
    """For what arrives without a plan; hidden_size is 0 where it does not fit, so that the operator says what is
    wrong."""
    if not hidden_size:
        return Launch(False, PassLaunch(), PassLaunch())
    sequences = h_0.shape[1] if sequences is None else sequences
    call = Call(
        cell=cell,
        device_type=x.device.type,
        dtype=x.dtype,
        layers=layers,
        together=True,
        hidden_size=hidden_size,
        projected=projected,
        tf32=x.dtype == torch.float32 and hardware.tf32(x.device),
        directions=h_0.shape[0] // layers,
        sequences=sequences,
        steps=class_of_steps(x.shape[0] // sequences) if padded and sequences else 0,
        options=options,
    )
    return launch_of(call, hardware.gpu_of(x.device))
