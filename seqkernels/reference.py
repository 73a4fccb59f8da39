"""The specification: RNN, GRU, LSTM and LiGRU, their options too, in float64, one sequence and one step at a time.

Every backend is judged by this page and never by another backend; the page itself is checked against
``torch.nn`` in float64. Formulas: the torch.nn documentation of RNN, GRU and LSTM (LSTM projections:
Sak, Senior and Beaufays 2014, https://arxiv.org/abs/1402.1128); LiGRU: Ravanelli et al. 2018,
https://arxiv.org/abs/1803.10225, without its batch normalization. Those of the options are in docs/cells.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks(NamedTuple):
    """What multiplies what, None where nothing does: of one step of one sequence; for `forward`, of a layer."""

    input: Tensor | None = None  # [I]; of a layer [B, I]
    recurrent: Tensor | None = None  # [P]; [D, B, P]
    candidate: Tensor | None = None  # [H]; [D, B, H]
    zoneout_h: Tensor | None = None  # [P], how much of the old h stays; [D, B, T, P]
    zoneout_c: Tensor | None = None  # [H]; [D, B, T, H]


def step(
    cell: str,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_ih,
    w_hh,
    b_ih,
    b_hh,
    w_hr,
    masks: Masks = Masks(),  # noqa: B008
    layer_norm: bool | str = False,
    norms: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """One step of one sequence: x ``[I]``, h ``[P]``, c ``[H]`` or None -> the next (h, c)."""
    x, h_before = _times(x, masks.input), _times(h, masks.recurrent)
    if layer_norm == "gates":
        scale, *norm_c = norms
        gates_x, gates_h = 0 * b_ih, _norm(w_ih @ x + w_hh @ h_before, scale) + b_ih + b_hh
    elif layer_norm:
        scale_ih, scale_hh, *norm_c = norms
        gates_x, gates_h = _norm(w_ih @ x, scale_ih) + b_ih, _norm(w_hh @ h_before, scale_hh) + b_hh
    else:
        norm_c = []
        gates_x, gates_h = w_ih @ x + b_ih, w_hh @ h_before + b_hh
    new_h, new_c = activate(cell, gates_x, gates_h, h, c, masks.candidate, norm_c)
    new_h = new_h if w_hr is None else w_hr @ new_h
    if c is None or new_c is None:
        return _zoned(h, new_h, masks.zoneout_h), None
    return _zoned(h, new_h, masks.zoneout_h), _zoned(c, new_c, masks.zoneout_c)


def activate(
    cell: str,
    gates_x: Tensor,
    gates_h: Tensor,
    h: Tensor,
    c: Tensor | None,
    candidate: Tensor | None = None,
    norm_c: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor | None]:
    """The next (h, c) from the gates ``[G*H]`` of x and of h; h of an LSTM before its projection."""
    if cell == "rnn_tanh":
        return torch.tanh(gates_x + gates_h), None
    if cell == "rnn_relu":
        return torch.relu(gates_x + gates_h), None
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3), gates_h.chunk(3)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = _times(torch.tanh(x_n + r * h_n), candidate)
        return (1 - z) * n + z * h, None
    if cell == "ligru":
        a, z = (gates_x + gates_h).chunk(2)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * _times(torch.relu(a), candidate), None
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4)
        assert c is not None
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * _times(torch.tanh(g), candidate)
        h = torch.sigmoid(o) * torch.tanh(_norm(c, *norm_c) if norm_c else c)
        return h, c
    raise ValueError(f"unknown cell {cell!r}")


def _times(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None else value * mask


def _zoned(before: Tensor, new: Tensor, stays: Tensor | None) -> Tensor:
    return new if stays is None else stays * before + (1 - stays) * new


def _norm(values: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    return F.layer_norm(values, values.shape, scale, shift, eps=1e-5)


def dense(w_hh: Tensor, blocks: int) -> Tensor:
    """The matrix ``[G*H, H]`` of blocks ``[G*H, H/k]``: zeros where units of two blocks meet."""
    units = w_hh.shape[1]
    block = torch.arange(len(w_hh)) // units % blocks  # of each row
    return (F.one_hot(block, blocks).unsqueeze(2) * w_hh.unsqueeze(1)).flatten(1)


def forward(
    cell: str,
    sequences: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    bidirectional: bool = False,
    masks: Sequence[Masks] = (),
    layer_norm: bool | str = False,
    norms: Sequence[Tensor] = (),
    blocks: int = 1,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Run every sequence by itself through all layers and directions, in float64 (differentiable).

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru", "lstm" or "ligru".
        sequences: B tensors ``[T_b, I]``; T_b may be 0.
        h_0: ``[L*D, B, P]``.
        c_0: ``[L*D, B, H]``, LSTM only.
        weights: flat, in torch.nn's order: for each layer, for each direction, w_ih, w_hh, (b_ih, b_hh), (w_hr).
        masks: of each layer.
        layer_norm, norms, blocks: as of `seqkernels.functional.gru`.

    Returns:
        the B outputs ``[T_b, D*P]``, h_n like h_0, c_n like c_0.
    """
    sequences, h_0 = [s.double() for s in sequences], h_0.double()
    c_0 = None if c_0 is None else c_0.double()
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    h_n, c_n = [], []
    for layer in range(num_layers):
        outputs: list[list[Tensor]] = []
        for direction in range(directions):
            k = layer * directions + direction
            w_ih, w_hh, *rest = (w.double() for w in weights[k * each : (k + 1) * each])
            b_ih, b_hh = rest[:2] if bias else (w_hh.new_zeros(len(w_hh)),) * 2
            w_hr, w_hh = rest[-1] if len(rest) == (3 if bias else 1) else None, dense(w_hh, blocks)
            count = len(norms) // (num_layers * directions)
            norm = layer_norm, [n.double() for n in norms[k * count : (k + 1) * count]]
            of_layer = masks[layer] if masks else Masks()
            outputs.append([])
            for b, sequence in enumerate(sequences):
                h, c, ys = h_0[k, b], None if c_0 is None else c_0[k, b], []
                for t in reversed(range(len(sequence))) if direction else range(len(sequence)):
                    at = (b,), *((direction, b),) * 2, *((direction, b, t),) * 2
                    drawn = Masks(*(None if m is None else m[i].double() for m, i in zip(of_layer, at, strict=True)))
                    h, c = step(cell, sequence[t], h, c, w_ih, w_hh, b_ih, b_hh, w_hr, drawn, *norm)
                    ys.append(h)
                outputs[-1].append(torch.stack(ys[::-1] if direction else ys) if ys else h_0.new_zeros(0, h.numel()))
                h_n.append(h)
                c_n.append(c)
        sequences = [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
    return sequences, _states(h_n, h_0), None if c_0 is None else _states(c_n, c_0)


def _states(states: list, like: Tensor) -> Tensor:
    return torch.stack(states).view(like.shape) if states else torch.zeros_like(like)
