"""The gradients of x and of the weights: matrix products over all rows, after the sweep."""

import torch
from torch import Tensor

from seqkernels.backends.triton.layer import Layer


def grad_x(layer: Layer, grad_gates: Tensor) -> Tensor:
    (grads, weight), *others = [
        (grads[:, columns], w.w_ih[rows])
        for w, grads in zip(layer.weights, grad_gates, strict=True)
        for columns, rows in _blocks_of_x(layer)
    ]
    total = torch.mm(grads, weight)
    for grads, weight in others:
        total.addmm_(grads, weight)
    return total


def grad_weights(layer: Layer, x, h_0, y, saved, grad_gates, grad_projected) -> list[Tensor]:
    """The gradients of the weights, in their order: products and sums over all rows that steps use."""
    H, P, used = layer.H, layer.P, layer.used
    of_h = slice(0, layer.G * H)
    found = []
    for d, (w, grads) in enumerate(zip(layer.weights, grad_gates[:, :used], strict=True)):
        grad_w_ih = torch.empty_like(w.w_ih, memory_format=torch.contiguous_format)
        for columns, rows in _blocks_of_x(layer):
            torch.mm(grads[:, columns].t(), x[:used], out=grad_w_ih[rows])
        h_prev = factors(layer, y[:, d * P : (d + 1) * P], h_0[d], d)[:used]
        found += [grad_w_ih, grads[:, of_h].t() @ h_prev]
        if layer.bias:
            found.append(torch.cat([grads[:, columns].sum(0) for columns, _ in _blocks_of_x(layer)]))
            found.append(grads[:, of_h].sum(0))
        if layer.projected:
            o, c = saved[:used, d, 3 * H : 4 * H], saved[:used, d, 4 * H :]
            found.append(grad_projected[d, :used].t() @ (o.float() * torch.tanh(c.float())).to(x.dtype))
    return found


def _blocks_of_x(layer: Layer) -> list[tuple[slice, slice]]:
    """Which columns of grad_gates belong to which rows of w_ih: see `kernels.cell_backward`."""
    H, G, apart = layer.H, layer.G, layer.cell.gates_apart
    together = slice(0, (G - apart) * H)
    own = [(slice(G * H, (G + apart) * H), slice((G - apart) * H, G * H))] if apart else []
    return [(together, together), *own]


def factors(layer: Layer, y: Tensor, h_0: Tensor, direction: int) -> Tensor:
    """For every row ``[N]`` the h that it started from, as its products had it; zeros for rows that no step uses, which
    have no gradient."""
    reverse = direction == 1
    mask = None if layer.masks.recurrent is None else layer.masks.recurrent[direction]
    if y.numel() == 0:
        return y
    if not layer.ragged:
        h = torch.cat([y[layer.B :], h_0] if reverse else [h_0, y[: -layer.B]])
        return h if mask is None else (h.view(-1, *h_0.shape) * mask).view_as(h).to(h.dtype)
    starts, sizes = layer.starts, layer.sizes
    row = torch.arange(layer.N, device=y.device)
    t = torch.searchsorted(starts + sizes, row, right=True).clamp(max=layer.T - 1)
    sequence = (row - starts[t]).clamp(max=layer.B - 1)
    before = t + 1 if reverse else t - 1
    there = before.clamp(0, layer.T - 1)
    ran = (before == there) & (sequence < sizes[there])
    row_before, first = starts[there] + sequence, sequence
    if layer.pieces is not None:
        first = layer.pieces
        ran &= layer.pieces[torch.where(ran, row_before, 0)] == first
    source = torch.where(ran, layer.C + row_before, first)
    source = torch.where(row < starts[-1] + sizes[-1], source, layer.C + layer.N)
    h = torch.cat([h_0, y, y.new_zeros(1, layer.P)])[source]
    return h if mask is None else (h * mask[sequence]).to(h.dtype)
