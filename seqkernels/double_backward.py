"""Second derivatives: the autograd formula of recurrence_backward and recurrence_recompute, once for every backend."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def save_for_formula(ctx, inputs, output):
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *between, launch, layers, pieces = inputs
    *results, wants_x, wants_weights = between
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.wants, ctx.launch, ctx.layers = cell, (wants_x, wants_weights), launch, layers
    ctx.has_pieces = pieces is not None
    ctx.results = len(results)  # y and saved, of recurrence_recompute none
    ctx.save_for_backward(grad_y, grad_h_n, grad_c_n, x, h_0, c_0, batch_sizes, pieces, *weights)


def formula(forward, backward, ctx, grad_grad_x, grad_grad_weights, grad_grad_h_0, grad_grad_c_0):
    """Differentiates both passes in plain torch operations, `forward` and `backward`.

    y and saved are functions of the other inputs, so all of the derivative is given to those.
    """
    *first, batch_sizes, pieces = ctx.saved_tensors[:8]
    weights = ctx.saved_tensors[8:]
    needs = ctx.needs_input_grad
    needed = (*needs[1:5], needs[6], needs[7], *needs[5])
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut this graph from the caller's, unless a still higher derivative is wanted.
        inputs = [
            t if t is None or not need else t.view_as(t) if deeper else t.detach().requires_grad_()
            for t, need in zip((*first, *weights), needed, strict=True)
        ]
        grad_y, grad_h_n, grad_c_n, x, h_0, c_0, *weights = inputs
        of_stack = x, weights, h_0, c_0, batch_sizes
        y, _, _, saved = forward(ctx.cell, *of_stack, True, ctx.launch, ctx.layers, pieces)
        options = *ctx.wants, ctx.launch, ctx.layers, pieces
        grad_x, grad_weights, grad_h_0, grad_c_0 = backward(
            ctx.cell, grad_y, grad_h_n, grad_c_n, *of_stack, y, saved, *options
        )
    outputs = grad_x, *grad_weights, grad_h_0, grad_c_0
    grads = grad_grad_x, *(grad_grad_weights or [None] * len(weights)), grad_grad_h_0, grad_grad_c_0
    grad_y, grad_h_n, grad_c_n, x, h_0, c_0, *weights = derivatives(outputs, grads, inputs, needed, deeper)
    grads = None, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, None, *[None] * ctx.results, None, None
    return *grads, *grads_of_options(ctx)


def cut(tensors: Sequence[Tensor | None], deeper: bool) -> list[Tensor | None]:
    """Aliases whose graph is cut from the caller's, unless a still higher derivative is wanted; all have gradients."""
    return [
        t if t is None else t.view_as(t) if deeper and t.requires_grad else t.detach().requires_grad_() for t in tensors
    ]


def derivatives(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    create_graph: bool,
) -> Iterator[Tensor | None]:
    """The gradients of the inputs that need one, None for the others."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    found: Iterator[Tensor]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    if pairs:
        of, by = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(of, wanted, by, create_graph=create_graph, materialize_grads=True))
    else:
        found = map(torch.zeros_like, wanted)
    # Zeros where nothing depends on an input, as the slope of relu does not: torch.nn's graph has that input as well.
    return (next(found) if need else None for need in needed)


def grads_of_options(ctx) -> tuple:
    """Of launch, layers and pieces: torch.library leaves last arguments out that have their defaults, and then wants no
    gradient of them; of an empty list that it has not left out, it wants an empty list."""
    count = 3 if ctx.has_pieces else 2 if ctx.layers > 1 else 1 if ctx.launch else 0
    return (None if ctx.launch else [], None, None)[:count]
