"""Cells with options (`seqkernels.cell_options`), step by step in plain torch operations, which torch differentiates.

The algebra of the cells is that of `torch_eager`; here stand what comes before it, the norms and the masked state, and
what comes behind it, zoneout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.backends.arguments import Weights, by_direction
from seqkernels.backends.precision import to_acc
from seqkernels.backends.torch_eager import all_previous, in_rows, lstm_gates, step, steps_of

EPS = 1e-5  # that is added to a variance, as in torch.nn.LayerNorm and haste


class Variant(NamedTuple):
    """What a layer's steps do beyond those of a plain cell; the masks are `seqkernels.cell_options.Masks`."""

    layer_norm: bool | str = False
    blocks: int = 1
    recurrent: Tensor | None = None  # [D, B, P]
    candidate: Tensor | None = None  # [D, B, H]
    zoneout_h: Tensor | None = None  # [N, D, P]
    zoneout_c: Tensor | None = None  # [N, D, H]


class Direction(NamedTuple):
    """What the steps of one direction need: the sums of the input, and what they become gates by."""

    of_x: Tensor  # [N, G*H]
    w_hh: Tensor
    scale: Tensor | None  # [G*H] of the norm of W_hh h or, of "gates", of both products' sum
    shift: Tensor | None  # [G*H] that is added behind it, and behind W_hh h where nothing is normalized
    scale_c: Tensor | None = None  # [H]
    shift_c: Tensor | None = None  # [H]
    w_hr: Tensor | None = None


def direction_of(x: Tensor, w: Weights, norms: Sequence[Tensor], layer_norm: bool | str) -> Direction:
    """`norms`: those of `CellOptions.norm_sizes`, in that order."""
    scale, shift = None, w.b_hh
    if layer_norm == "gates":
        of_x, scale = F.linear(x, w.w_ih), norms[0]
        shift = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
    elif layer_norm:
        of_x, scale = _normalized(F.linear(x, w.w_ih), norms[0], w.b_ih), norms[1]
    else:
        of_x = F.linear(x, w.w_ih, w.b_ih)
    scale_c, shift_c = (*norms[2:], None, None)[:2]
    return Direction(of_x, w.w_hh, scale, shift, scale_c, shift_c, w.w_hr)


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],  # of each direction
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer -> y ``[N, D*P]``, h_n and c_n."""
    dtype = x.dtype
    x, h_0, c_0, *weights = to_acc(x, h_0, c_0, *weights)
    directions = directions_of(x, weights, to_acc(*norms), h_0.shape[0], variant.layer_norm)
    y, h_n, c_n = sweep(cell, directions, h_0, c_0, batch_sizes, variant)
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype)


def directions_of(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[Tensor], count: int, layer_norm: bool | str
) -> list[Direction]:
    """Those of one layer, of which everything is in the dtype of computation."""
    each = len(norms) // count
    of_norms = (norms[d * each : (d + 1) * each] for d in range(count))
    return [direction_of(x, *own, layer_norm) for own in zip(by_direction(weights, count), of_norms, strict=True)]


def sweep(
    cell: str, directions: Sequence[Direction], h_0: Tensor, c_0: Tensor | None, batch_sizes: Tensor | None,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The steps of a layer -> y ``[N, D*P]``, h_n and c_n."""
    rows = directions[0].of_x.shape[0]
    # Of an empty batch one step of no rows, so that results have a graph, as those of kernels do.
    steps = steps_of(batch_sizes, rows, h_0.shape[1]) or [(0, 0)]
    ys, h_n, c_n = [], [], []
    for d, of in enumerate(directions):
        sums = _Sums(of, variant)
        h, c = h_0[d], h_0.new_zeros(h_0.shape[1], 0) if c_0 is None else c_0[d]
        y = []
        for start, size in reversed(steps) if d else steps:
            now = slice(start, start + size)
            h_before, c_before = h[:size], c[:size]
            gates = sums.gates(of.of_x[now], _times(h_before, variant.recurrent, (d, slice(size))))
            candidate = None if variant.candidate is None else variant.candidate[d, :size]
            h_t, c_t, _ = step(cell, *gates, of.w_hr, h_before, c_before, candidate, sums.of_c)
            h_t = _zoned(h_before, h_t, variant.zoneout_h, (now, d))
            c_t = _zoned(c_before, c_t, variant.zoneout_c, (now, d))
            y.append(h_t)
            h, c = torch.cat([h_t, h[size:]]), torch.cat([c_t, c[size:]])
        ys.append(in_rows(y[::-1] if d else y, rows, h_0.shape[2], h_0))
        h_n.append(h)
        c_n.append(c)
    return torch.cat(ys, 1), torch.stack(h_n), torch.stack(c_n)


def cell_states(
    x: Tensor,  # [N, I]
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],  # of each direction
    y: Tensor,  # [N, D*P]
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    variant: Variant,
) -> Tensor:
    """c ``[N, D*H]`` at every step of one LSTM layer whose output is y.

    With h of all steps known, the gates of all steps are two products, and c is a sum over time, of single numbers.
    """
    dtype, (rows, _), directions = y.dtype, y.shape, len(h_0)
    x, y, h_0, c_0, *weights = to_acc(x, y, h_0, c_0, *weights)
    steps = steps_of(batch_sizes, rows, h_0.shape[1])
    found = []
    for d, of in enumerate(directions_of(x, weights, to_acc(*norms), directions, variant.layer_norm)):

        def of_rows(mask: Tensor, d: int = d) -> Tensor:
            return in_rows([mask[d, :size] for _, size in steps], rows, mask.shape[2], mask)

        h_before = all_previous(steps, d == 1, y.chunk(directions, 1)[d], h_0[d])
        if variant.recurrent is not None:
            h_before = h_before * of_rows(variant.recurrent)
        gates_x, gates_h = _Sums(of, variant).gates(of.of_x, h_before)
        i, kept, g, _ = lstm_gates(gates_x + gates_h)
        added = i * g if variant.candidate is None else i * (g * of_rows(variant.candidate))
        c, of_steps = c_0[d], []
        for start, size in reversed(steps) if d else steps:
            now = slice(start, start + size)
            c_t = kept[now] * c[:size] + added[now]
            of_steps.append(_zoned(c[:size], c_t, variant.zoneout_c, (now, d)))
            c = torch.cat([of_steps[-1], c[size:]])
        found.append(in_rows(of_steps[::-1] if d else of_steps, rows, c_0.shape[2], c_0))
    return torch.cat(found, 1).to(dtype)


def _times(state: Tensor, mask: Tensor | None, at: tuple) -> Tensor:
    return state if mask is None else state * mask[at]


def _zoned(before: Tensor, new: Tensor, stays: Tensor | None, at: tuple) -> Tensor:
    return new if stays is None else new + stays[at] * (before - new)


class _Sums:
    """The sums of one direction that go into its gates, and the norm of its c."""

    def __init__(self, of: Direction, variant: Variant) -> None:
        self.of, self.kind, self.blocks = of, variant.layer_norm, variant.blocks
        self.w_hh = of.w_hh
        if self.blocks > 1:  # [k, H/k of h, G*H/k]
            units = of.w_hh.shape[1]
            self.w_hh = of.w_hh.view(-1, self.blocks, units, units).permute(1, 3, 0, 2).flatten(2)

    def gates(self, of_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """What a cell adds up to its gates: that of the input and that of h."""
        if self.blocks == 1 and not self.kind:
            return of_x, F.linear(h, self.w_hh, self.of.shift)
        of_h = F.linear(h, self.w_hh) if self.blocks == 1 else self._by_blocks(h)
        if self.kind == "gates":
            return torch.zeros_like(of_x), _normalized(of_x + of_h, self.of.scale, self.of.shift)
        if self.kind:
            return of_x, _normalized(of_h, self.of.scale, self.of.shift)
        return of_x, of_h if self.of.shift is None else of_h + self.of.shift

    def of_c(self, c: Tensor) -> Tensor:
        return c if self.of.scale_c is None else _normalized(c, self.of.scale_c, self.of.shift_c)

    def _by_blocks(self, h: Tensor) -> Tensor:
        units = h.shape[1] // self.blocks
        of_blocks = torch.bmm(h.view(-1, self.blocks, units).transpose(0, 1), self.w_hh)  # [k, B, G*H/k]
        return of_blocks.view(self.blocks, len(h), self.w_hh.shape[2] // units, units).permute(1, 2, 0, 3).flatten(1)


def _normalized(sums: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return F.layer_norm(sums, sums.shape[1:], scale, shift, EPS)
