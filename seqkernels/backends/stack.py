"""Runs a stack of layers on a backend that runs one layer: forward from the first up, backward from the last down.

Weights and states of the layers lie one behind the other.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.backends.cells import CELLS

ALIGNED = 64  # elements


class SavedLayout(NamedTuple):
    """What layers leave in `saved`, as csrc/arguments.h says it as well: for each its blocks ``[N, D, K*H]`` and, but
    for the last, its y ``[N, D*P]``, which begin at multiples of ALIGNED elements."""

    rows: int
    directions: int
    blocks: int  # K*H
    projected: int
    layers: int

    @classmethod
    def of(cls, cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, layers: int) -> "SavedLayout":
        hidden_size = weights[1].shape[0] // CELLS[cell].gates
        return cls(
            rows=x.shape[0],
            directions=h_0.shape[0] // layers,
            blocks=CELLS[cell].saved_blocks * hidden_size,
            projected=h_0.shape[2],
            layers=layers,
        )

    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parts."""
        blocks, y = (self.rows, self.directions, self.blocks), (self.rows, self.directions * self.projected)
        return [blocks, *([y, blocks] * (self.layers - 1))]

    def shape(self) -> tuple[int, ...]:
        first, *others = self.shapes()
        sizes = [math.prod(shape) for shape in self.shapes()]
        return (sum(map(self._aligned, sizes[:-1])) + sizes[-1],) if others else first

    def parts(self, saved: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The blocks of all layers, and y of all but the last."""
        shapes = self.shapes()
        ends = itertools.accumulate((self._aligned(math.prod(shape)) for shape in shapes), initial=0)
        flat = saved.flatten()
        views = [flat.narrow(0, at, math.prod(shape)).view(shape) for at, shape in zip(ends, shapes, strict=False)]
        return views[::2], views[1::2]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `parts`: blocks and y alternate."""
        *others, last = (part.flatten() for part in parts)
        flat = [*(F.pad(part, (0, self._aligned(len(part)) - len(part))) for part in others), last]
        return torch.cat(flat if self.blocks else flat[1::2])  # torch.vmap over no members joins no empty tensors

    def _aligned(self, size: int) -> int:
        return -(-size // ALIGNED) * ALIGNED


def forward(
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],  # one layer
    cell: str,
    x: Tensor,  # [N, I]
    weights: Sequence[Tensor],
    h_0: Tensor,  # [L*D, B, P]
    c_0: Tensor | None,  # [L*D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
    launch: Sequence[int] = (),
    layers: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if layers == 1:
        return run(cell, x, weights, h_0, c_0, batch_sizes, save, launch)
    layout = SavedLayout.of(cell, x, weights, h_0, layers)
    h_n, c_n, kept = [], [], []
    for of_layer in each(layers, weights, h_0, c_0):
        x, h, c, saved = run(cell, x, *of_layer, batch_sizes, save, launch)
        h_n.append(h)
        c_n.append(c)
        if save:
            kept += [saved, x]
    return x, torch.cat(h_n), torch.cat(c_n), layout.joined(kept[:-1]) if save else saved


def backward(
    run: Callable[..., tuple[Tensor, list[Tensor], Tensor, Tensor]],
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [L*D, B, P]
    grad_c_n: Tensor | None,  # [L*D, B, H]
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P] of the last layer
    saved: Tensor,  # SavedLayout
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int] = (),
    layers: int = 1,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if layers == 1:
        return run(
            cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights,
            launch,
        )  # fmt: skip
    blocks, below = SavedLayout.of(cell, x, weights, h_0, layers).parts(saved)
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
    parts = [None if state is None else state.chunk(layers) for state in states]
    for layer in range(layers):
        own = [None if part is None else part[layer] for part in parts]
        yield weights[layer * count : (layer + 1) * count], *own
