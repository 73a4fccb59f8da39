"""A stand-in for torch's cuDNN operators on the CPU, so that the backend cudnn runs in every test.

It takes and gives what the operators of aten/src/ATen/native/cudnn/RNN.cpp do, and refuses what they refuse; torch's
CPU kernels compute. Where cuDNN is free it is nasty: the buffer of weights has gaps, and a backward spoils the reserve.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from seqkernels import hardware

MODES = ("rnn_relu", "rnn_tanh", "lstm", "gru")
GAP = 3  # elements between the matrices and the biases in the buffer of weights


def layout(input_size, mode, hidden_size, proj_size, layers, bidirectional) -> tuple[int, list[list[tuple]]]:
    """The size of the buffer, and for each layer and direction (place, shape) of w_ih, w_hh, b_ih, b_hh, w_hr."""
    gates, directions = (1, 1, 4, 3)[mode] * hidden_size, 2 if bidirectional else 1
    matrices, biases, end = [], [], 0

    def place(*shape: int) -> tuple:
        nonlocal end
        start, end = end, end + torch.Size(shape).numel()
        return start, shape

    for k in range(layers * directions):
        width = input_size if k < directions else directions * (proj_size or hidden_size)
        matrices.append([place(gates, width), place(gates, proj_size or hidden_size)])
        matrices[-1] += [place(proj_size, hidden_size)] if proj_size else []
    end += GAP
    for _ in matrices:
        biases.append([place(gates), place(gates)])
    return end, [own[:2] + bias + own[2:] for own, bias in zip(matrices, biases, strict=True)]


def views(buffer: Tensor, each: int, places: list[list[tuple]]) -> list[Tensor]:
    found = []
    for own in places:
        own = own[:2] + own[4:] if each < 4 else own  # no biases
        found += [buffer[start : start + torch.Size(shape).numel()].view(shape) for start, shape in own]
    return found


def flatten_weight(weights, each, input_size, mode, hidden_size, proj_size, layers, batch_first, bidirectional):
    total, places = layout(input_size, mode, hidden_size, proj_size, layers, bidirectional)
    buffer = weights[0].new_zeros(total)
    for weight, view in zip(weights, views(buffer, each, places), strict=True):
        view.copy_(weight)
        weight.set_(view)
    return buffer


def run(x, weights, each, flat, hx, cx, mode, hidden_size, proj_size, layers, dropout, train, bidirectional, sizes):
    assert flat is not None, "cuDNN would warn that weights are not part of a single contiguous chunk of memory"
    assert dropout == 0, "cuDNN's dropout cannot be differentiated twice"
    assert all(size > 0 for size in sizes) and list(sizes) == sorted(sizes, reverse=True)
    assert (cx is not None) == (mode == 2) and hx.is_contiguous() and (cx is None or cx.is_contiguous())
    assert {t.dtype for t in (x, flat, hx, *weights)} == {x.dtype}
    assert len(sizes or x) <= 65535 and x.numel() + hx.numel() > 0 and x.dim() == (2 if sizes else 3)
    total, places = layout(x.shape[-1], mode, hidden_size, proj_size, layers, bidirectional)
    assert flat.shape == (total,)
    for bias in (b for own in places for b in own[2:4] if each < 4):
        assert not flat[bias[0] : bias[0] + bias[1][0]].any()
    states = (hx, cx) if mode == 2 else hx
    rest = states, views(flat, each, places), each >= 4, layers, 0.0, train, bidirectional
    function = getattr(torch._VF, MODES[mode])
    args = (x, torch.tensor(sizes, device="cpu"), *rest) if sizes else (x, *rest, False)
    y, h_n, *c_n = function(*args)
    return y, h_n, c_n[0] if c_n else h_n.new_zeros(0)


def rnn(x, weights, each, flat, hx, cx, mode, hidden, proj, layers, batch_first, dropout, train, two, sizes, state):
    y, h_n, c_n = run(x, weights, each, flat, hx, cx, mode, hidden, proj, layers, dropout, train, two, sizes)
    return y, h_n, c_n, torch.full((5 if train else 0,), 7, dtype=torch.uint8), flat.view(-1)


def rnn_backward(
    x, weights, each, flat, hx, cx, y, grad_y, grad_hy, grad_cy, mode, hidden, proj, layers, batch_first, dropout,
    train, two, sizes, state, reserve, mask,
):  # fmt: skip
    assert train, "cudnn RNN backward can only be called in training mode"
    assert reserve.tolist() == [7] * 5, "the reserve of this forward was used before"
    reserve.zero_()
    call = each, mode, hidden, proj, layers, dropout, train, two, sizes
    with ThreadPoolExecutor(1) as fresh:  # an operator runs below autograd, a new thread does not
        inputs, grads = fresh.submit(derived, x, weights, flat, hx, cx, (grad_y, grad_hy, grad_cy), *call).result()
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]
    _, places = layout(x.shape[-1], mode, hidden, proj, layers, two)
    grad_weights = [view.clone() for view in views(grads[-1], each, places)] if mask[3] else []
    assert not (mask[2] and mode != 2)
    return grads[0], grads[1], grads[2] if mode == 2 else grads[1].new_zeros(0), grad_weights


def derived(x, weights, flat, hx, cx, grads, each, *options):
    inputs = [t.detach().requires_grad_() for t in (x, hx, cx, flat) if t is not None]
    x, hx, *cx, flat = inputs
    outputs = run(x, weights, each, flat, hx, cx[0] if cx else None, *options)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    outputs, grads = zip(*pairs, strict=True)
    return inputs, torch.autograd.grad(outputs, inputs, grads, allow_unused=True)


library = torch.library.Library("aten", "IMPL")
library.impl("_cudnn_rnn", rnn, "CPU")
library.impl("_cudnn_rnn_backward", rnn_backward, "CPU")
library.impl("_cudnn_rnn_flatten_weight", flatten_weight, "CPU")
# The backend asks which cuDNN there is where the tensors are: the newest whose rules it knows.
hardware.THIS_MACHINE = hardware.THIS_MACHINE._replace(cudnn=91300)
