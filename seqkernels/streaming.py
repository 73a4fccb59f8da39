"""One step of a stream through all layers of a module: what a decoder calls for each input, with its last state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels import checks, functional, kept_weights, onnx_export, with_options
from seqkernels.backends import cpu
from seqkernels.cell_options import DROPOUTS, CellOptions
from seqkernels.checks import State
from seqkernels.inputs import Inputs, prepare

if TYPE_CHECKING:
    from seqkernels.modules import _Recurrent

# The CPU's kernels multiply a call of so few rows (kFewRows of csrc/cpu/gemm.h) in another order.
FEW_ROWS = 8


def step(
    cell: str,
    x: Tensor,  # [B, I], or [I] of one sequence
    state: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    recompute: bool,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
    backend: str | None = None,
    kept_by: "_Recurrent | None" = None,
) -> tuple[Tensor, State]:
    """One step of all layers -> y like x with P features, and the new state like the given one."""
    checks.check_kind(weights)
    checks.check_flag("recompute", recompute)
    checks.check_input_of_step(x)
    parts = with_options.parts_of(cell, weights, cell_options, norms, training, num_layers, bias)
    dropout = dropout if training else 0.0
    if parts is not None:
        _check_masks(parts)
    if onnx_export.exporting():
        onnx_export.check_no_options(parts)
        y, state = onnx_export.recurrent(
            cell, x.unsqueeze(0), state, weights, num_layers, 1, dropout, False, None, None, bias
        )  # fmt: skip
        return y.squeeze(0), state
    blocks = 1 if parts is None else parts.cell_options.blocks
    inputs = prepare(cell, x.unsqueeze(0), state, weights, num_layers, 1, bias=bias, blocks=blocks)
    plan, together = functional.planned(inputs, weights, dropout, recompute, parts, backend)
    sequences = inputs.rows.sequences
    if plan.backend == "cpu" and parts is None:
        plan = plan._replace(launch=cpu.as_among_others(plan.launch))
        if kept_by is not None and together:
            plan = kept_weights.keeping(kept_by, plan, inputs.save)
    elif plan.backend == "cpu" and sequences <= FEW_ROWS:
        inputs = _among_others(inputs, FEW_ROWS + 1 - sequences)
    y, h, c = functional.run(plan, inputs, weights, together, dropout, recompute, parts)
    y, h, c = y[:sequences], h[:, :sequences], c[:, :sequences]
    if x.dim() == 1:
        y, h, c = y.squeeze(0), h.squeeze(1), c.squeeze(1)
    return y, h if inputs.c_0 is None else (h, c)


def _check_masks(parts: with_options.Parts) -> None:
    of_sequence = [name for name in DROPOUTS if parts.training and getattr(parts.cell_options, name)]
    if of_sequence:
        raise ValueError(
            f"{of_sequence[0]} has one mask for all steps of a sequence, which steps by themselves have not: call "
            "eval(), or the layer on the whole sequence"
        )


def _among_others(inputs: Inputs, others: int) -> Inputs:
    """The step beside `others` sequences of zeros, so that it has the bits it has within a sequence."""
    more, c_0 = (0, 0, 0, others), inputs.c_0
    return inputs._replace(
        rows=inputs.rows._replace(data=F.pad(inputs.rows.data, more)),
        h_0=F.pad(inputs.h_0, more),
        c_0=None if c_0 is None else F.pad(c_0, more),
    )


def write(out: tuple[Tensor, State], y: Tensor, state: State) -> tuple[Tensor, State]:
    """Copy the results of a step into tensors of the caller's.

    Raises:
        TypeError: no tensors.
        RuntimeError: gradients are wanted, as with any `out=` of torch; shapes or dtypes that do not fit.
    """
    expected = "out is (y, state), tensors like the results of a step"
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(expected)
    to_y, to_state = out
    targets, results = ((to_y, *_tensors(to_state)), (y, *_tensors(state)))
    if len(targets) != len(results):
        raise RuntimeError(f"out is (y, state) with {len(results) - 1} tensors of state, got {len(targets) - 1}")
    for target, result in zip(targets, results, strict=True):
        if not isinstance(target, Tensor):
            raise TypeError(f"{expected}, got a {type(target).__name__}")
        if torch.is_grad_enabled() and (result.requires_grad or target.requires_grad):
            raise RuntimeError("step(out=...) has no gradients: call it under torch.no_grad() or inference_mode()")
        if (target.shape, target.dtype, target.device) != (result.shape, result.dtype, result.device):
            raise RuntimeError(
                f"out has a tensor {list(target.shape)} of {target.dtype} on {target.device} where the step gives "
                f"{list(result.shape)} of {result.dtype} on {result.device}"
            )
    for target, result in zip(targets, results, strict=True):
        target.copy_(result)
    return out


def _tensors(state: State) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)
