"""Sequences that consist of pieces, for kernels that know none: they run the pieces side by side.

The operators take ``pieces`` (`seqkernels.ops`). Here rows, and what is saved of them, are copied into the order of a
ragged batch of the pieces and back, so that results are where those of kernels that know pieces are.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.backends.stack import SavedLayout
from seqkernels.late_checks import fitting_pieces, out_of_sight


class _Order(NamedTuple):
    """Of a ragged batch of pieces."""

    rows: Tensor  # [N] the given row at each place
    places: Tensor  # [N] its inverse
    states: Tensor  # [C] the given state at each place
    places_of_states: Tensor  # [C] its inverse
    batch_sizes: Tensor  # [T]

    def to_rows(self, *given: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.index_select(0, self.rows) for t in given]

    def to_states(self, *given: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.index_select(1, self.states) for t in given]

    def back(self, rows: Tensor, *states: Tensor) -> list[Tensor]:
        """rows ``[N, *]``, or none, and states ``[*, C, *]`` as they were given."""
        rows = rows.index_select(0, self.places) if len(rows) else rows
        return [rows, *(state.index_select(1, self.places_of_states) for state in states)]

    def saved(self, index: Tensor, saved: Tensor, layout: SavedLayout) -> Tensor:
        """What a forward pass saved of `rows`, in another order."""
        if layout.layers == 1:
            return saved.index_select(0, index)
        blocks, ys = ([part.index_select(0, index) for part in parts] for parts in layout.parts(saved))
        return layout.joined([part for pair in zip(blocks, [*ys, blocks[-1]], strict=True) for part in pair][:-1])


class _Rows(NamedTuple):
    """Of the rows that steps use, their step, sequence and piece, and the order of pieces."""

    step: Tensor
    sequence: Tensor
    piece: Tensor
    by_piece: Tensor


def _checked(pieces: Tensor, batch_sizes: Tensor, count: int) -> _Rows:
    """The rows of `count` pieces, which are read.

    Raises:
        RuntimeError: pieces that do not fit; as csrc/check.h.
    """
    device = pieces.device
    sizes = batch_sizes.to(device)
    step = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    used = torch.arange(len(step), device=device)
    sequence, pieces = used - (sizes.cumsum(0) - sizes)[step], pieces[: len(step)]
    if not ((pieces >= 0) & (pieces < count)).all():
        raise RuntimeError(f"pieces are numbers of the {count} states of h_0")
    by_piece = pieces.argsort(stable=True)
    before, after = by_piece[:-1], by_piece[1:]
    follow = (sequence[before] == sequence[after]) & (step[before] + 1 == step[after])
    if not (follow | (pieces[before] != pieces[after])).all():
        raise RuntimeError("the rows of a piece do not follow each other in one sequence")
    return _Rows(step, sequence, pieces, by_piece)


def _side_by_side(pieces: Tensor, batch_sizes: Tensor, count: int) -> _Order:
    """The order of `count` pieces, checked."""
    rows = len(pieces)
    step, _, pieces, by_piece = _checked(pieces, batch_sizes, count)
    device, used = pieces.device, torch.arange(len(step), device=pieces.device)
    begins = torch.searchsorted(pieces[by_piece], torch.arange(count + 1, device=device))
    lengths, states = begins.diff().sort(descending=True, stable=True)
    of_piece, rank = torch.empty_like(step), states.argsort()
    of_piece[by_piece] = used - begins[pieces[by_piece]]
    index = torch.arange(rows, device=device)  # rows that no step uses stay behind the others
    index[: len(step)] = (of_piece * count + rank[pieces]).argsort()
    steps = torch.arange(len(batch_sizes), device=device)
    running = count - torch.searchsorted(lengths.flip(0), steps, right=True)
    return _Order(index, index.argsort(), states, rank, running.to(batch_sizes.device))


def of_rows(pieces: Tensor, batch_sizes: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """pieces ``[N]`` and batch_sizes of what an operator is given.

    Raises:
        RuntimeError: pieces that are not one number for each row.
    """
    if batch_sizes is None and pieces.dim() == 2:
        steps, sequences = pieces.shape
        pieces, batch_sizes = pieces.flatten(), torch.full((steps,), sequences, device="cpu")
    if batch_sizes is None:
        raise RuntimeError("pieces go with batch_sizes, or are [steps, sequences]")
    rows = len(x)
    if pieces.dtype != torch.int64 or pieces.shape != (rows,) or pieces.device != x.device:
        raise RuntimeError(f"pieces is [rows], int64, where x is, one for each of the {rows} rows of x")
    return pieces.contiguous(), batch_sizes


def sequences_of(h_0: Tensor, batch_sizes: Tensor | None, pieces: Tensor | None) -> int:
    """How many sequences there are; with pieces batch_sizes are on the CPU."""
    if pieces is None:
        return h_0.shape[1]
    return pieces.shape[-1] if batch_sizes is None else sum(batch_sizes[:1].tolist())


def _in_kernels(pieces: Tensor, batch_sizes: Tensor | None, x: Tensor, weights: Sequence[Tensor], h_0: Tensor) -> bool:
    """Whether kernels that know pieces have those of this call, which are checked then: nothing is projected, and the
    host knows how many sequences run."""
    projected = len(weights) // max(len(h_0), 1) % 2 == 1
    if projected or (batch_sizes is not None and out_of_sight(batch_sizes)):
        return False
    if not out_of_sight(pieces):
        _checked(*of_rows(pieces, batch_sizes, x), h_0.shape[1])
    return True


def forward_of(run: Callable, knows_pieces: bool = False) -> Callable:
    """A backend's forward pass, with the argument pieces, which some backends know themselves."""

    def forward(cell, x, weights, h_0, c_0, batch_sizes, save, launch=(), layers=1, pieces=None):
        if pieces is None:
            return run(cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers)
        pieces = fitting_pieces(pieces, h_0.shape[1])
        if knows_pieces and _in_kernels(pieces, batch_sizes, x, weights, h_0):
            return run(cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces)
        pieces, batch_sizes = of_rows(pieces, batch_sizes, x)
        order = _side_by_side(pieces, batch_sizes, h_0.shape[1])
        rows, states = order.to_rows(x), order.to_states(h_0, c_0)
        y, h_n, c_n, saved = run(cell, *rows, weights, *states, order.batch_sizes, save, [], layers)
        y, h_n, c_n = order.back(y, h_n, c_n)
        if not save:
            return y, h_n, c_n, saved
        return y, h_n, c_n, order.saved(order.places, saved, SavedLayout.of(cell, x, weights, h_0, layers))

    return forward


def backward_of(run: Callable, knows_pieces: bool = False) -> Callable:
    """A backend's backward pass, with the argument pieces."""

    def backward(
        cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights,
        launch=(), layers=1, pieces=None,
    ):  # fmt: skip
        wants = wants_x, wants_weights
        if pieces is None:
            grads = grad_y, grad_h_n, grad_c_n
            return run(cell, *grads, x, weights, h_0, c_0, batch_sizes, y, saved, *wants, launch, layers)
        pieces = fitting_pieces(pieces, h_0.shape[1])
        if knows_pieces and _in_kernels(pieces, batch_sizes, x, weights, h_0):
            of_stack = x, weights, h_0, c_0, batch_sizes
            options = wants_x, wants_weights, launch, layers, pieces
            return run(cell, grad_y, grad_h_n, grad_c_n, *of_stack, y, saved, *options)
        pieces, batch_sizes = of_rows(pieces, batch_sizes, x)
        order = _side_by_side(pieces, batch_sizes, h_0.shape[1])
        saved = order.saved(order.rows, saved, SavedLayout.of(cell, x, weights, h_0, layers))
        grad_y, x, y = order.to_rows(grad_y, x, y)
        grad_h_n, grad_c_n, h_0, c_0 = order.to_states(grad_h_n, grad_c_n, h_0, c_0)
        grads = grad_y, grad_h_n, grad_c_n
        grad_x, grad_weights, grad_h_0, grad_c_0 = run(
            cell, *grads, x, weights, h_0, c_0, order.batch_sizes, y, saved, *wants, [], layers
        )
        grad_x, grad_h_0, grad_c_0 = order.back(grad_x, grad_h_0, grad_c_0)
        return grad_x, grad_weights, grad_h_0, grad_c_0

    return backward
