"""The specification: RNN, GRU, LSTM and LiGRU in float64, one sequence and one step at a time.

Every backend is judged by this page and never by another backend; the page itself is checked against
``torch.nn`` in float64. Formulas: the torch.nn documentation of RNN, GRU and LSTM (LSTM projections:
Sak, Senior and Beaufays 2014, https://arxiv.org/abs/1402.1128); LiGRU: Ravanelli et al. 2018,
https://arxiv.org/abs/1803.10225, without its batch normalization.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def activate(cell: str, gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The next (h, c) from the gates ``[G*H]`` of x and of h; h of an LSTM before its projection."""
    if cell == "rnn_tanh":
        return torch.tanh(gates_x + gates_h), None
    if cell == "rnn_relu":
        return torch.relu(gates_x + gates_h), None
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3), gates_h.chunk(3)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return (1 - z) * n + z * h, None
    if cell == "ligru":
        a, z = (gates_x + gates_h).chunk(2)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * torch.relu(a), None
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4)
        assert c is not None
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    raise ValueError(f"unknown cell {cell!r}")


def step(
    cell: str, x: Tensor, h: Tensor, c: Tensor | None, w_ih, w_hh, b_ih, b_hh, w_hr
) -> tuple[Tensor, Tensor | None]:
    """One step of one sequence: x ``[I]``, h ``[P]``, c ``[H]`` or None -> the next (h, c)."""
    h, c = activate(cell, w_ih @ x + b_ih, w_hh @ h + b_hh, h, c)
    return (h if w_hr is None else w_hr @ h), c


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
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Run every sequence by itself through all layers and directions, in float64 (differentiable).

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru", "lstm" or "ligru".
        sequences: B tensors ``[T_b, I]``; T_b may be 0.
        h_0: ``[L*D, B, P]``.
        c_0: ``[L*D, B, H]``, LSTM only.
        weights: flat, in torch.nn's order: for each layer, for each direction, w_ih, w_hh, (b_ih, b_hh), (w_hr).

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
            w_hr = rest[-1] if len(rest) == (3 if bias else 1) else None
            outputs.append([])
            for b, sequence in enumerate(sequences):
                h, c, ys = h_0[k, b], None if c_0 is None else c_0[k, b], []
                for x in reversed(sequence.unbind()) if direction else sequence.unbind():
                    h, c = step(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr)
                    ys.append(h)
                outputs[-1].append(torch.stack(ys[::-1] if direction else ys) if ys else h_0.new_zeros(0, h.numel()))
                h_n.append(h)
                c_n.append(c)
        sequences = [torch.cat(both, -1) for both in zip(*outputs, strict=True)]
    return sequences, _states(h_n, h_0), None if c_0 is None else _states(c_n, c_0)


def _states(states: list, like: Tensor) -> Tensor:
    return torch.stack(states).view(like.shape) if states else torch.zeros_like(like)
