"""The operator pair of one layer with masks: zoneout, and dropout of h in the products and of candidates.

``masked_forward.<backend>`` and its backward are ``recurrence_forward`` of one layer with these arguments besides, in
float64 for float64 and else in float32, contiguous, None where nothing is masked:

recurrent ``[D, B, P]``, candidate ``[D, B, H]``, zoneout_h ``[N, D, P]``, zoneout_c ``[N, D, H]``:
`seqkernels.cell_options.Masks`

`saved` is what a plain layer saves; its c is the one that is carried. An RNN with zoneout_h saves h before its old one
may replace it, ``[N, D, H]``. A backend says by `Backend.unsupported` which masks it has, and whether beside a
projection.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqkernels import flops, inplace
from seqkernels._ops import ops
from seqkernels.backends import autocast, cuda, torch_steps, triton
from seqkernels.backends.arguments import StepMasks
from seqkernels.backends.cells import CELLS
from seqkernels.backends.torch_steps import Variant
from seqkernels.cell_options import Masks
from seqkernels.double_backward import cut, derivatives
from seqkernels.hardware import THIS_MACHINE
from seqkernels.ops import fake_backward, fake_forward, reads_y, register
from seqkernels.select import Plan

_OF_LAYER = (
    "Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor? recurrent, Tensor? candidate, "
    "Tensor? zoneout_h, Tensor? zoneout_c"
)
FORWARD_SCHEMA = f"(str cell, {_OF_LAYER}, bool save, int[] launch) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)"
BACKWARD_SCHEMA = (
    f"(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, {_OF_LAYER}, Tensor y, Tensor saved, "
    "bool wants_x, bool wants_weights, int[] launch) "
    "-> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, Tensor grad_c_0)"
)

_library = torch.library.Library(ops.name, "FRAGMENT")


def forward(
    plan: Plan,
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    masks: Masks,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator of the plan's backend -> y, h_n, c_n; save: gradients are wanted."""
    contiguous = [mask if mask is None else mask.contiguous() for mask in masks[1:]]
    args = cell, x, list(weights), h_0, c_0, batch_sizes, *contiguous, save
    return getattr(ops.masked_forward, plan.backend)(*args, list(plan.launch) or [0])[:3]


def _fake_forward(cell, x, weights, h_0, c_0, batch_sizes, recurrent, candidate, zoneout_h, zoneout_c, save, launch):
    y, h_n, c_n, saved = fake_forward(cell, x, weights, h_0, c_0, batch_sizes, save)
    blocks = StepMasks(recurrent, candidate, zoneout_h, zoneout_c).saved_blocks(cell)
    return y, h_n, c_n, x.new_empty(zoneout_h.shape) if save and blocks > CELLS[cell].saved_blocks else saved


def _fake_backward(cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *rest):
    *_, y, saved, wants_x, wants_weights, _ = rest
    of_layer = x, weights, h_0, c_0, batch_sizes, y, saved
    return fake_backward(cell, grad_y, grad_h_n, grad_c_n, *of_layer, wants_x, wants_weights)


def _save_for_backward(ctx, inputs, output) -> None:
    cell, x, weights, h_0, c_0, batch_sizes, *masks, save, launch = inputs
    y, _, c_n, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((c_n, saved) if c_0 is None else (saved,)))
    ctx.cell, ctx.launch = cell, launch
    if save:
        ctx.changes, y = inplace.kept(y)
        ctx.save_for_backward(x, h_0, c_0, batch_sizes, *masks, y, saved, *weights)


def _formula(forward: Callable, backward: Callable, ctx, grad_y, grad_h_n, grad_c_n, _):
    kept = ctx.saved_tensors  # once: recompute=True computes them only then
    (x, h_0, c_0, batch_sizes, *masks, y, saved), weights = kept[:10], kept[10:]
    wants = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2])
    of_layer = x, weights, h_0, c_0, batch_sizes, *masks
    if ctx.changes and ctx.changes.any() and reads_y(ctx.cell, x, h_0, batch_sizes):
        with torch.no_grad():
            y = forward(ctx.cell, *of_layer, False, ctx.launch)[0]
    grads = backward(ctx.cell, grad_y, grad_h_n, grad_c_n, *of_layer, y, saved, *wants, ctx.launch)
    grad_x, grad_weights, grad_h_0, grad_c_0 = grads
    of_weights = grad_weights if wants[1] else [None] * len(weights)
    of_states = grad_h_0, None if c_0 is None else grad_c_0
    return None, grad_x if wants[0] else None, of_weights, *of_states, *[None] * 6, None if ctx.launch else []


def _setup_double_backward(ctx, inputs, output) -> None:
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *rest = inputs
    *masks, _, _, wants_x, wants_weights, launch = rest
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.wants, ctx.launch = cell, (wants_x, wants_weights), launch
    ctx.save_for_backward(grad_y, grad_h_n, grad_c_n, x, h_0, c_0, batch_sizes, *masks, *weights)


def _double_backward(ctx, *grad_grads):
    """Differentiates the gradients of the layer in plain torch operations, of which y and saved are functions."""
    kept, needs = ctx.saved_tensors, ctx.needs_input_grad
    (*first, batch_sizes), masks, weights = kept[:7], kept[7:11], kept[11:]
    needed = (*needs[1:5], needs[6], needs[7], *needs[5])
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list = cut((*first, *weights), deeper)
        grads, (x, h_0, c_0), weights = inputs[:3], inputs[3:6], inputs[6:]
        variant = Variant(False, 1, *masks)
        results = torch_steps.forward(ctx.cell, x, weights, (), h_0, c_0, batch_sizes, variant)
        wanted = [x, *weights, h_0, *([] if c_0 is None else [c_0])]
        outputs: list = list(derivatives(results, grads, wanted, [True] * len(wanted), True))
    of_x, of_weights, of_h_0, of_c_0 = grad_grads
    given = [of_x if ctx.wants[0] else None, *((of_weights if ctx.wants[1] else None) or [None] * len(weights)), of_h_0]
    given += [] if c_0 is None else [of_c_0]
    grad_y, grad_h_n, grad_c_n, x, h_0, c_0, *weights = derivatives(outputs, given, inputs, needed, deeper)
    return None, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, *[None] * 9, None if ctx.launch else []


def _register(backend: str) -> None:
    forward, backward = (getattr(getattr(ops, name), backend) for name in ("masked_forward", "masked_backward"))
    derivative = functools.partial(_formula, forward, backward), _save_for_backward
    register(forward, _fake_forward, derivative, _library)
    register(backward, _fake_backward, (_double_backward, _setup_double_backward), _library)


# Both passes of each backend that has them in Python; csrc/cpu/ops.cpp defines and implements its own.
_PASSES: dict[str, tuple[Callable, Callable]] = {
    "cuda": (cuda.masked_forward, autocast.switched_off(cuda.masked_backward)),
    "triton": (triton.masked_forward, autocast.switched_off(triton.masked_backward)),
}
for _backend, _both in _PASSES.items():
    for _name, _schema, _run in zip(
        ("masked_forward", "masked_backward"), (FORWARD_SCHEMA, BACKWARD_SCHEMA), _both, strict=True
    ):
        _library.define(f"{_name}.{_backend}{_schema}")
        _library.impl(f"{_name}.{_backend}", _run, "CompositeExplicitAutograd")
for _backend in (*_PASSES, *([] if THIS_MACHINE.native_missing else ["cpu"])):
    _register(_backend)
flops.register(flops.MASKED)
