"""The derivative of cuDNN's kernels, and the way to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels.backends import torch_eager
from seqkernels.backends.autocast import cast_arguments
from seqkernels.backends.cells import CELLS
from seqkernels.backends.cudnn import host


class Recurrence(torch.autograd.Function):
    """All layers by torch's own kernels, whose derivative torch cannot differentiate: where that is wanted, the first
    derivative is that of torch_eager."""

    @staticmethod
    def forward(ctx, recompute, cell, directions, x, h_0, c_0, batch_sizes, *weights):
        y, h_n, c_n, kept = host.forward(cell, directions, x, weights, h_0, c_0, batch_sizes, True)
        ctx.set_materialize_grads(False)
        if CELLS[cell].states == 1:
            ctx.mark_non_differentiable(c_n)
        ctx.cell, ctx.directions, ctx.weights, ctx.recompute = cell, directions, len(weights), recompute
        ctx.save_for_backward(x, h_0, c_0, batch_sizes, *weights, *(() if recompute else (y, *kept)))
        return y, h_n, c_n

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n):
        grads = grad_y, grad_h_n, grad_c_n
        x, h_0, c_0, batch_sizes, *rest = ctx.saved_tensors
        weights, results = rest[: ctx.weights], rest[ctx.weights :]
        needs = ctx.needs_input_grad[3:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return None, None, None, *Recurrence._differentiable(ctx, grads, needs, x, h_0, c_0, batch_sizes, *weights)
        layers = x, weights, h_0, c_0, batch_sizes
        wants = (*needs[:3], any(needs[4:]))
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        if ctx.recompute:
            with torch.amp.autocast(x.device.type, enabled=False):  # what is saved has its dtype already
                y, _, _, kept = host.forward(ctx.cell, ctx.directions, *layers, True)
        else:
            y, *kept = results
        grad_x, grad_h_0, grad_c_0, grad_weights = host.backward(
            ctx.cell, ctx.directions, *grads, *layers, y, kept, wants, again
        )
        return None, None, None, grad_x, grad_h_0, grad_c_0, None, *grad_weights

    @staticmethod
    def _differentiable(ctx, grads, needs, *inputs):
        """The gradients as functions of the gradients of the outputs and of all inputs."""
        aliases = [t.view_as(t) if need else t for t, need in zip(inputs, needs, strict=True)]
        x, h_0, c_0, batch_sizes, *weights = aliases
        layers = len(h_0) // ctx.directions
        results = torch_eager.forward(ctx.cell, x, weights, h_0, c_0, batch_sizes, False, layers=layers)[:3]
        outputs, grads = zip(*((o, g) for o, g in zip(results, grads, strict=True) if g is not None), strict=True)
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]


def run(
    cell: str,
    directions: int,
    wanted: bool,
    recompute: bool,
    x: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, whose states and weights lie one behind the other -> y, h_n, c_n.

    wanted: gradients are; recompute: for them the forward pass runs again.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    runs = cast_arguments(_run, x.device.type) if autocast else _run
    return runs(cell, directions, wanted, recompute, x, h_0, c_0, batch_sizes, weights)


def _run(cell, directions, wanted, recompute, x, h_0, c_0, batch_sizes, weights):
    if wanted:
        return Recurrence.apply(recompute, cell, directions, x, h_0, c_0, batch_sizes, *weights)
    return host.forward(cell, directions, x, weights, h_0, c_0, batch_sizes, wanted)[:3]
