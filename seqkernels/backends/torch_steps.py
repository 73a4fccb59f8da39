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
from seqkernels.backends.torch_eager import in_rows, step, steps_of

EPS = 1e-5  # that is added to a variance, as in torch.nn.LayerNorm and haste


class Variant(NamedTuple):
    """What a layer's steps do beyond those of a plain cell; the masks are `seqkernels.cell_options.Masks`."""

    layer_norm: bool | str = False
    blocks: int = 1
    recurrent: Tensor | None = None  # [D, B, P]
    candidate: Tensor | None = None  # [D, B, H]
    zoneout_h: Tensor | None = None  # [N, D, P]
    zoneout_c: Tensor | None = None  # [N, D, H]


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],  # for each direction those of `CellOptions.norm_sizes`, in that order
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer -> y ``[N, D*P]``, h_n and c_n."""
    dtype, rows, directions = x.dtype, x.shape[0], h_0.shape[0]
    x, h_0, c_0, *weights = to_acc(x, h_0, c_0, *weights)
    norms = to_acc(*norms)
    steps, each = steps_of(batch_sizes, rows, h_0.shape[1]), len(norms) // directions
    ys, h_n, c_n = [], [], []
    for d, w in enumerate(by_direction(weights, directions)):
        sums = _Sums(w, norms[d * each : (d + 1) * each], variant)
        of_x = sums.of_input(x)
        h, c = h_0[d], h_0.new_zeros(h_0.shape[1], 0) if c_0 is None else c_0[d]
        y = []
        for start, size in reversed(steps) if d else steps:
            now = slice(start, start + size)
            h_before, c_before = h[:size], c[:size]
            gates = sums.gates(of_x[now], _times(h_before, variant.recurrent, (d, slice(size))))
            candidate = None if variant.candidate is None else variant.candidate[d, :size]
            h_t, c_t, _ = step(cell, *gates, w.w_hr, h_before, c_before, candidate, sums.of_c)
            h_t = _zoned(h_before, h_t, variant.zoneout_h, (now, d))
            c_t = _zoned(c_before, c_t, variant.zoneout_c, (now, d))
            y.append(h_t)
            h, c = torch.cat([h_t, h[size:]]), torch.cat([c_t, c[size:]])
        ys.append(in_rows(y[::-1] if d else y, rows, h_0.shape[2], h_0))
        h_n.append(h)
        c_n.append(c)
    return torch.cat(ys, 1).to(dtype), torch.stack(h_n).to(dtype), torch.stack(c_n).to(dtype)


def _times(state: Tensor, mask: Tensor | None, at: tuple) -> Tensor:
    return state if mask is None else state * mask[at]


def _zoned(before: Tensor, new: Tensor, stays: Tensor | None, at: tuple) -> Tensor:
    return new if stays is None else new + stays[at] * (before - new)


class _Sums:
    """The sums of one direction that go into its gates, and the norm of its c."""

    def __init__(self, w: Weights, norms: Sequence[Tensor], variant: Variant) -> None:
        self.w, self.kind, self.blocks = w, variant.layer_norm, variant.blocks
        self.scales = norms[:2] if self.kind is True else norms[:1]
        self.biases = None if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
        self.norm_c = norms[2:]
        self.w_hh = w.w_hh
        if self.blocks > 1:  # [k, H/k of h, G*H/k]
            units = w.w_hh.shape[1]
            self.w_hh = w.w_hh.view(-1, self.blocks, units, units).permute(1, 3, 0, 2).flatten(2)

    def of_input(self, x: Tensor) -> Tensor:
        """W_ih x of all rows, normalized and shifted where it is so by itself."""
        if self.kind == "gates":
            return F.linear(x, self.w.w_ih)
        if self.kind:
            return _shifted(_normalized(F.linear(x, self.w.w_ih), self.scales[0]), self.w.b_ih)
        return F.linear(x, self.w.w_ih, self.w.b_ih)

    def gates(self, of_x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """What a cell adds up to its gates: that of the input and that of h."""
        of_h = F.linear(h, self.w_hh) if self.blocks == 1 else self._by_blocks(h)
        if self.kind == "gates":
            return torch.zeros_like(of_x), _shifted(_normalized(of_x + of_h, self.scales[0]), self.biases)
        return of_x, _shifted(_normalized(of_h, self.scales[1]) if self.kind else of_h, self.w.b_hh)

    def of_c(self, c: Tensor) -> Tensor:
        return _normalized(c, *self.norm_c) if self.norm_c else c

    def _by_blocks(self, h: Tensor) -> Tensor:
        units = h.shape[1] // self.blocks
        of_blocks = torch.bmm(h.view(-1, self.blocks, units).transpose(0, 1), self.w_hh)  # [k, B, G*H/k]
        return of_blocks.view(self.blocks, len(h), self.w_hh.shape[2] // units, units).permute(1, 2, 0, 3).flatten(1)


def _normalized(sums: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return F.layer_norm(sums, sums.shape[1:], scale, shift, EPS)


def _shifted(sums: Tensor, bias: Tensor | None) -> Tensor:
    return sums if bias is None else sums + bias
