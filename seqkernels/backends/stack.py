"""A stack of layers by a backend that runs one: from the first up, and from the last down.

Weights and states of the layers lie one behind the other. What the layers leave in `saved` is laid out as
csrc/check.h says it as well: for each its blocks ``[N, D, K*H]`` and, but for the last, its y ``[N, D*P]``.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def forward(
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],  # one layer
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,  # [L*D, B, P]
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    save: bool,
    launch: Sequence[int],
    layers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if layers == 1:
        return run(cell, x, weights, h_0, c_0, batch_sizes, save, launch)
    h_n, c_n, kept = [], [], []
    for of_layer in each(layers, weights, h_0, c_0):
        x, h, c, saved = run(cell, x, *of_layer, batch_sizes, save, launch)
        h_n.append(h)
        c_n.append(c)
        if save:
            kept += [saved, x]
    return x, torch.cat(h_n), torch.cat(c_n), _joined(kept[:-1], layers) if save else saved


def backward(
    run: Callable[..., tuple[Tensor, list[Tensor], Tensor, Tensor]],
    cell: str,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,  # [L*D, B, P]
    grad_c_n: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    saved: Tensor,
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int],
    layers: int,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if layers == 1:
        return run(
            cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights,
            launch,
        )  # fmt: skip
    blocks, below = parts(saved, layers, y.shape[1])
    xs, ys = [x, *below], [*below, y]
    each_layer = list(each(layers, weights, grad_h_n, grad_c_n, h_0, c_0))
    grad_weights: list[Tensor] = []
    grads_h_0: list[Tensor] = []
    grads_c_0: list[Tensor] = []
    for k in reversed(range(layers)):
        of_layer, grad_h, grad_c, *states = each_layer[k]
        grad_y, grads, grad_h, grad_c = run(
            cell, grad_y, grad_h, grad_c, xs[k], of_layer, *states, batch_sizes, ys[k], blocks[k],
            wants_x or k > 0, wants_weights, launch,
        )  # fmt: skip
        grad_weights = [*grads, *grad_weights]
        grads_h_0.insert(0, grad_h)
        grads_c_0.insert(0, grad_c)
    assert grad_y is not None
    return grad_y, grad_weights, torch.cat(grads_h_0), torch.cat(grads_c_0)


def each(layers: int, weights: Sequence[Tensor], *states: Tensor | None) -> Iterator[tuple]:
    """For each layer its weights and of states ``[L*D, *]`` its own ``[D, *]``."""
    count = len(weights) // layers
    for layer in range(layers):
        of_layer = [None if state is None else state.chunk(layers)[layer] for state in states]
        yield weights[layer * count : (layer + 1) * count], *of_layer


def parts(saved: Tensor, layers: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """What all layers saved: their blocks, and y ``[N, width]`` of all but the last."""
    rows, directions, kept = saved.shape
    projected = width // directions
    blocks = (kept + projected) // layers - projected
    sizes = [rows * directions * blocks, rows * width] * layers
    flat = saved.flatten().split(sizes[:-1])
    return [part.view(rows, directions, blocks) for part in flat[::2]], [part.view(rows, width) for part in flat[1::2]]


def _joined(kept: list[Tensor], layers: int) -> Tensor:
    rows, directions, blocks = kept[0].shape
    width = layers * blocks + (layers - 1) * (kept[1].shape[1] // directions)
    return torch.cat([part.flatten() for part in kept]).view(rows, directions, width)
