"""The calls of cuDNN by torch's operators.

They are those of torch's gru and lstm (aten/src/ATen/native/cudnn/RNN.cpp of PyTorch), but for three things. cuDNN
reads the weights from one buffer, which is made here in every call unless they lie in one already: the user's
parameters are never moved. Its training mode is a matter of whether gradients are wanted, so that they can be had in
eval mode as well. And sequences that never run, which cuDNN does not know, are left out.

Whether two runs give the same bits is up to cuDNN and cuBLAS: see the note on determinism at torch.nn.LSTM.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels.backends.cells import CELLS

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # cudnnRNNMode_t


def forward(
    cell: str,
    directions: int,
    x: Tensor,  # [N, I]
    weights: Sequence[Tensor],  # of L*D layers and directions
    h_0: Tensor,  # [L*D, B, P]
    c_0: Tensor | None,  # [L*D, B, H]
    batch_sizes: Tensor | None,  # [T], on the CPU
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """-> y ``[N, D*P]``, h_n, c_n (else ``[L*D, B, 0]``) and, with `save`, what `backward` takes as `kept`."""
    call = _Call(cell, directions, x, weights, h_0, c_0, batch_sizes)
    if not call.rows:
        y, c_n = x.new_zeros(len(x), directions * h_0.shape[2]), h_0.new_zeros(*h_0.shape[:2], 0)
        return y, h_0.clone(), c_n if c_0 is None else c_0.clone(), ()
    flat = _flat(weights, *call.layout)
    inputs = call.x, weights, call.each, flat, call.h_0, call.c_0
    y, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(*inputs, *call.options(train=save), None)
    y = _with_zero_rows(y.view(call.rows, -1), len(x))
    h_n = _with_rest(h_n, h_0, call.running, h_0.shape[1])
    c_n = h_0.new_zeros(*h_0.shape[:2], 0) if c_0 is None else _with_rest(c_n, c_0, call.running, h_0.shape[1])
    return y, h_n, c_n, (reserve, flat) if save else ()


def backward(
    cell: str,
    directions: int,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    kept: tuple[Tensor, ...],
    wants: tuple[bool, bool, bool, bool],  # the gradients of x, h_0, c_0, weights
    again: bool,  # this backward may be asked for once more
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """-> gradients of x, h_0, c_0, weights; None where they are not wanted."""
    call = _Call(cell, directions, x, weights, h_0, c_0, batch_sizes)
    if not call.rows:
        zeros = [torch.zeros_like(w) if wants[3] else None for w in weights]
        return torch.zeros_like(x), grad_h_n, grad_c_n, zeros
    reserve, flat = kept
    grads = (
        None if grad_y is None else call.in_steps(grad_y),
        *(None if grad is None else grad[:, : call.running] for grad in (grad_h_n, grad_c_n)),
    )
    grad_x, grad_h_0, grad_c_0, grad_weights = torch.ops.aten._cudnn_rnn_backward(
        *(call.x, weights, call.each, flat, call.h_0, call.c_0, call.in_steps(y), *grads),
        *call.options(train=True),
        None,
        reserve.clone() if again else reserve,  # cuDNN's backward writes into it
        wants,
    )
    return (
        _with_zero_rows(grad_x.view(call.rows, -1), len(x)) if wants[0] else None,
        _with_rest(grad_h_0, grad_h_n, call.running, h_0.shape[1]) if wants[1] else None,
        _with_rest(grad_c_0, grad_c_n, call.running, h_0.shape[1]) if wants[2] else None,
        grad_weights if wants[3] else [None] * len(weights),
    )


class _Call:
    """The arguments of a call as cuDNN's functions take them."""

    def __init__(self, cell, directions, x, weights, h_0, c_0, batch_sizes):
        sizes = None if batch_sizes is None else [size for size in batch_sizes.tolist() if size]
        self.rows = len(x) if sizes is None else sum(sizes)
        self.running = h_0.shape[1] if sizes is None else max(sizes, default=0)  # sequences that run at all
        # Sequences of one length are a padded batch, for which cuDNN has the faster kernels.
        self.sizes = sizes if sizes and sizes[-1] < sizes[0] else []
        self.each = len(weights) // len(h_0)
        hidden_size = weights[0].shape[0] // CELLS[cell].gates
        projected = weights[1].shape[1] if self.each % 2 else 0
        self._model = MODES[cell], hidden_size, projected, len(h_0) // directions
        self._bidirectional = directions == 2
        first = weights[0]
        self.layout = (*self._model, self._bidirectional, self.each, first.shape[1], first.dtype, first.device)
        self.x = self.in_steps(x)
        self.h_0 = h_0[:, : self.running].contiguous()
        self.c_0 = None if c_0 is None else c_0[:, : self.running].contiguous()

    def in_steps(self, rows: Tensor) -> Tensor:
        """Rows ``[N, *]`` as ``[T, B, *]`` of a padded batch; of a packed one those that steps use."""
        rows = rows[: self.rows].contiguous()
        return rows if self.sizes else rows.view(-1, max(self.running, 1), rows.shape[1])

    def options(self, train: bool) -> tuple:
        return *self._model, False, 0.0, train, self._bidirectional, self.sizes  # not batch_first, no dropout


def _flat(weights: Sequence[Tensor], *layout) -> Tensor:
    """The weights in cuDNN's one buffer: the memory they lie in, if it is one, else a copy.

    Without biases it is a copy: where cuDNN expects them it must read zeros, and the user's memory may hold anything.
    """
    total, places = _layout(*layout)
    first, size = weights[0], weights[0].element_size()
    memory, biases = first.untyped_storage(), layout[5] >= 4
    if (
        biases
        and memory.nbytes() >= total * size
        and all(
            w.is_contiguous() and w.data_ptr() == memory.data_ptr() + place * size
            for w, place in zip(weights, places, strict=True)
        )
    ):
        return first.detach().as_strided((total,), (1,), 0)
    pieces, end = [], 0
    for place, weight in sorted(zip(places, weights, strict=True), key=lambda pair: pair[0]):
        if place > end:
            pieces.append(weight.new_zeros(place - end))
        pieces.append(weight.detach().reshape(-1))
        end = place + weight.numel()
    if total > end:  # where a layer has no biases
        pieces.append(first.new_zeros(total - end))
    return torch.cat(pieces)


@functools.cache
def _layout(
    mode: int,
    hidden_size: int,
    proj_size: int,
    layers: int,
    bidirectional: bool,
    each: int,
    input_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, tuple[int, ...]]:
    """The number of elements of cuDNN's buffer, and where each weight begins in it: cuDNN is asked once."""
    cell = next(name for name, number in MODES.items() if number == mode)
    gates = CELLS[cell].gates * hidden_size
    directions = 2 if bidirectional else 1
    weights = []
    for layer in range(layers):
        width = directions * (proj_size or hidden_size) if layer else input_size
        shapes = [(gates, width), (gates, proj_size or hidden_size), (gates,), (gates,), (proj_size, hidden_size)]
        shapes = shapes[: 2 if each < 4 else 4] + shapes[4:] * (each % 2)
        weights += [torch.empty(shape, dtype=dtype, device=device) for shape in shapes * directions]
    options = input_size, mode, hidden_size, proj_size, layers, False, bidirectional
    flat = torch._cudnn_rnn_flatten_weight(weights, each, *options)
    return flat.numel(), tuple(int(weight.storage_offset()) for weight in weights)


def _with_zero_rows(rows: Tensor, count: int) -> Tensor:
    """Zeros for the rows that no step uses."""
    return rows if len(rows) == count else torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _with_rest(states: Tensor, others: Tensor | None, running: int, sequences: int) -> Tensor:
    """States ``[L*D, running, *]``, and those of the sequences that never run; zeros where there are none."""
    if running == sequences:
        return states
    if others is None:
        return torch.cat([states, states.new_zeros(len(states), sequences - running, states.shape[2])], 1)
    return torch.cat([states, others[:, running:]], 1)
