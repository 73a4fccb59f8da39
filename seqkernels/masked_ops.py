"""The operator pair of one layer with masks that kernels have: zoneout and dropout of h in the products.

``masked_forward.cpu`` and its backward are ``recurrence_forward`` of one layer with these arguments besides
(csrc/cpu/ops.cpp defines them), in float64 for float64 and else in float32, contiguous, None where nothing is masked:

recurrent ``[D, B, P]``, zoneout_h ``[N, D, P]``, zoneout_c ``[N, D, H]``: `seqkernels.cell_options.Masks`

`saved` is what a plain layer saves; its c is the one that is carried. There is no projection, and no RNN.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import batching
from seqkernels._ops import add_op_namespace_prefix, ops
from seqkernels.backends import torch_steps
from seqkernels.backends.torch_steps import Variant
from seqkernels.cell_options import Masks
from seqkernels.hardware import THIS_MACHINE
from seqkernels.ops import derivatives, fake_backward, fake_forward

_library = torch.library.Library(ops.name, "FRAGMENT")


def forward(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    masks: Masks,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator -> y, h_n, c_n; save: gradients are wanted."""
    of_step = masks.recurrent, masks.zoneout_h, masks.zoneout_c
    contiguous = [mask if mask is None else mask.contiguous() for mask in of_step]
    return ops.masked_forward.cpu(cell, x, list(weights), h_0, c_0, batch_sizes, *contiguous, save)[:3]


def _fake_forward(cell, x, weights, h_0, c_0, batch_sizes, recurrent, zoneout_h, zoneout_c, save):
    return fake_forward(cell, x, weights, h_0, c_0, batch_sizes, save)


def _fake_backward(cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *rest):
    *_, y, saved, wants_x, wants_weights = rest
    of_layer = x, weights, h_0, c_0, batch_sizes, y, saved
    return fake_backward(cell, grad_y, grad_h_n, grad_c_n, *of_layer, wants_x, wants_weights)


def _save_for_backward(ctx, inputs, output) -> None:
    cell, x, weights, h_0, c_0, batch_sizes, *masks, save = inputs
    y, _, c_n, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((c_n, saved) if c_0 is None else (saved,)))
    ctx.cell = cell
    if save:
        ctx.save_for_backward(x, h_0, c_0, batch_sizes, *masks, y, saved, *weights)


def _formula(ctx, grad_y, grad_h_n, grad_c_n, _):
    x, h_0, c_0, batch_sizes, recurrent, zoneout_h, zoneout_c, y, saved, *weights = ctx.saved_tensors
    wants = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2])
    of_layer = x, weights, h_0, c_0, batch_sizes, recurrent, zoneout_h, zoneout_c
    grad_x, grad_weights, grad_h_0, grad_c_0 = ops.masked_backward.cpu(
        ctx.cell, grad_y, grad_h_n, grad_c_n, *of_layer, y, saved, *wants
    )
    of_weights = grad_weights if wants[1] else [None] * len(weights)
    of_states = grad_h_0, None if c_0 is None else grad_c_0
    return None, grad_x if wants[0] else None, of_weights, *of_states, None, None, None, None, None


def _setup_double_backward(ctx, inputs, output) -> None:
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *masks, _, _, wants_x, wants_weights = inputs
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.wants = cell, (wants_x, wants_weights)
    ctx.save_for_backward(grad_y, grad_h_n, grad_c_n, x, h_0, c_0, batch_sizes, *masks, *weights)


def _double_backward(ctx, *grad_grads):
    """Differentiates the gradients of the layer in plain torch operations, of which y and saved are functions."""
    *first, batch_sizes, recurrent, zoneout_h, zoneout_c = ctx.saved_tensors[:10]
    weights, needs = ctx.saved_tensors[10:], ctx.needs_input_grad
    needed = (*needs[1:5], needs[6], needs[7], *needs[5])
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut this graph from the caller's, unless a still higher derivative is wanted.
        inputs: list = [
            t if t is None else t.view_as(t) if deeper and t.requires_grad else t.detach().requires_grad_()
            for t in (*first, *weights)
        ]
        grads, (x, h_0, c_0), weights = inputs[:3], inputs[3:6], inputs[6:]
        variant = Variant(recurrent=recurrent, zoneout_h=zoneout_h, zoneout_c=zoneout_c)
        results = torch_steps.forward(ctx.cell, x, weights, (), h_0, c_0, batch_sizes, variant)
        wanted = [x, *weights, h_0, *([] if c_0 is None else [c_0])]
        outputs: list = list(derivatives(results, grads, wanted, [True] * len(wanted), True))
    of_x, of_weights, of_h_0, of_c_0 = grad_grads
    given = [of_x if ctx.wants[0] else None, *((of_weights if ctx.wants[1] else None) or [None] * len(weights)), of_h_0]
    given += [] if c_0 is None else [of_c_0]
    grad_y, grad_h_n, grad_c_n, x, h_0, c_0, *weights = derivatives(outputs, given, inputs, needed, deeper)
    return None, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, *[None] * 8


def _register() -> None:
    for name, fake, formula, setup in (
        ("masked_forward", _fake_forward, _formula, _save_for_backward),
        ("masked_backward", _fake_backward, _double_backward, _setup_double_backward),
    ):
        full_name = add_op_namespace_prefix(f"{name}.cpu")
        torch.library.register_fake(full_name, fake, lib=_library)
        torch.library.register_autograd(full_name, formula, setup_context=setup, lib=_library)
        batching.register(f"{name}.cpu", batching.Members(getattr(ops, name).cpu, None), _library)


if not THIS_MACHINE.native_missing:
    _register()
