"""How the Triton kernels are launched, and the matrix products around them.

Two paths, which `tiles` chooses from the sizes and the GPU alone: *resident*, one kernel that walks a tile of
sequences through all its steps with the recurrent weights on chip, and *stepwise*, for each step a matrix product and a
kernel, both directions in each. Nothing waits for the device, so both can be captured in a CUDA graph.

float32 products follow torch's switches: those inside the kernels torch.backends.cudnn.rnn, as nn.GRU's do; those that
torch multiplies (the input projection, the gradients of x and of the weights, a step of the stepwise path)
torch.backends.cuda.matmul.
"""

import functools
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from seqkernels.backends import stack
from seqkernels.backends.arguments import NO_MASKS, StepMasks, check, check_backward
from seqkernels.backends.side_by_side import of_rows
from seqkernels.backends.triton import gradients
from seqkernels.backends.triton.layer import Layer
from seqkernels.backends.triton.tiles import DTYPES, NO_KERNEL
from seqkernels.late_checks import fitting, fitting_backward


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: list[Tensor],
    h_0: Tensor,  # [L*D, B, P]
    c_0: Tensor | None,  # [L*D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
    launch: Sequence[int] = (),
    layers: int = 1,
    pieces: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if pieces is not None:
        pieces, batch_sizes = of_rows(pieces, batch_sizes, x)
    _check(cell, x, weights, h_0, c_0, batch_sizes, layers)
    batch_sizes, run = fitting(x, h_0, batch_sizes), functools.partial(_forward, pieces=pieces)
    return stack.forward(run, cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers)


def masked_forward(
    cell, x, weights, h_0, c_0, batch_sizes, recurrent, candidate, zoneout_h, zoneout_c, save, launch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer with masks: `seqkernels.masked_ops`."""
    masks = StepMasks(recurrent, candidate, zoneout_h, zoneout_c)
    _check(cell, x, weights, h_0, c_0, batch_sizes, 1)
    masks.check_without_norm(cell, x, weights, h_0)
    return _forward(cell, x, weights, h_0, c_0, fitting(x, h_0, batch_sizes), save, launch, masks)


def _forward(
    cell, x, weights, h_0, c_0, batch_sizes, save, launch, masks=NO_MASKS, pieces=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer."""
    layer = Layer(cell, x, weights, h_0, batch_sizes, launch, masks, pieces)
    # Rows that no step uses come out as zeros.
    new = x.new_empty if batch_sizes is None else x.new_zeros
    y = new(layer.N, layer.D * layer.P)
    saved = new(layer.N, layer.D, layer.K * layer.H if save else 0)
    h_n = h_0.clone(memory_format=torch.contiguous_format)
    c_n = h_0.new_zeros(layer.D, layer.C, 0) if c_0 is None else _copy(c_0, torch.float32)
    if layer.has_work:
        gates_x = x.new_empty(layer.D, layer.N, layer.G * layer.H)
        for w, gates in zip(layer.weights, gates_x, strict=True):
            _linear(x, w.w_ih, w.b_ih, out=gates)
        with layer.guard():
            if pieces is None:
                run = _resident_forward if layer.tile.resident else _stepwise_forward
                run(layer, gates_x, h_n, c_n, y, saved, save)
            else:
                initial = (state if state is None else state.contiguous() for state in (h_0, c_0))
                states = dict(zip(STATES, (*initial, h_n, c_n), strict=True))
                h, c = (_outermost(layer, state, last=False) for state in (h_n, c_n))
                _stepwise_forward(layer, gates_x, h, c, y, saved, save, states)
    return y, h_n, c_n.to(x.dtype), saved


def backward(
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [L*D, B, P]
    grad_c_n: Tensor | None,  # [L*D, B, H]
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P]
    saved: Tensor,
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int] = (),
    layers: int = 1,
    pieces: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    if pieces is not None:
        pieces, batch_sizes = of_rows(pieces, batch_sizes, x)
    _check(cell, x, weights, h_0, c_0, batch_sizes, layers)
    check_backward(cell, (grad_y, grad_h_n, grad_c_n), x, weights, h_0, c_0, y, saved, layers)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    return stack.backward(
        functools.partial(_backward, pieces=pieces), cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0,
        batch_sizes, y, saved, wants_x, wants_weights, launch, layers,
    )  # fmt: skip


def masked_backward(
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, recurrent, candidate, zoneout_h, zoneout_c, y,
    saved, wants_x, wants_weights, launch,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    grads, masks = (grad_y, grad_h_n, grad_c_n), StepMasks(recurrent, candidate, zoneout_h, zoneout_c)
    _check(cell, x, weights, h_0, c_0, batch_sizes, 1)
    masks.check_without_norm(cell, x, weights, h_0)
    check_backward(cell, grads, x, weights, h_0, c_0, y, saved, masks=masks)
    x, batch_sizes = fitting_backward(x, h_0, batch_sizes, wants_weights)
    return _backward(
        cell, *grads, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, launch, masks
    )  # fmt: skip


def _backward(
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, launch,
    masks=NO_MASKS, pieces=None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:  # fmt: skip
    """One layer."""
    layer = Layer(cell, x, weights, h_0, batch_sizes, launch, masks, pieces)
    D, C, N, H, P = layer.D, layer.C, layer.N, layer.H, layer.P
    # The stepwise path multiplies into it.
    carried = torch.float32 if layer.tile.resident and pieces is None else x.dtype
    grad_h = given_or_zeros(grad_h_n, (D, C, P), x, carried)
    grad_c = given_or_zeros(grad_c_n, (D, C, 0 if c_0 is None else H), x, torch.float32)
    # Rows that no step uses have no gradient.
    new = x.new_empty if batch_sizes is None else x.new_zeros
    grad_gates = new(D, N, layer.F * H)
    grad_projected = new(D, N, P if layer.projected else 0)
    if layer.has_work:
        h_0 = h_0.contiguous()
        c_0 = h_0 if c_0 is None else c_0.contiguous()
        grad_y = None if grad_y is None else grad_y.contiguous()
        y, saved = y.contiguous(), saved.contiguous()
        with layer.guard():
            of_rows = h_0, c_0, y, saved, grad_gates, grad_projected
            if pieces is None:
                run = _resident_backward if layer.tile.resident else _stepwise_backward
                run(layer, grad_y, grad_h, grad_c, *of_rows)
            else:
                of_final = grad_h.clone(), grad_c.clone()
                states = dict(zip(GRADS_OF_STATES, (*of_final, grad_h, grad_c), strict=True))
                of_h, of_c = (_outermost(layer, grad, last=True) for grad in of_final)
                _stepwise_backward(layer, grad_y, of_h, of_c, *of_rows, states)
                _put_outermost(layer, grad_h, of_h)
                _put_outermost(layer, grad_c, of_c)
    grad_x = gradients.grad_x(layer, grad_gates) if wants_x else x.new_empty(0)
    if not wants_weights:
        grad_weights = [x.new_empty(0) for _ in weights]
    elif layer.has_work:
        grad_weights = gradients.grad_weights(layer, x, h_0, y, saved, grad_gates, grad_projected)
    else:
        grad_weights = [torch.zeros_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    return grad_x, grad_weights, grad_h.to(x.dtype), grad_c.to(x.dtype)


def _check(cell, x, weights, h_0, c_0, batch_sizes, layers) -> None:
    check(cell, x, weights, h_0, c_0, batch_sizes, layers)
    if x.dtype not in DTYPES:
        raise RuntimeError(NO_KERNEL.format(x.dtype))


# ---- the sweeps

STATES, GRADS_OF_STATES = ("h_0", "c_0", "h_n", "c_n"), ("grad_h_n", "grad_c_n", "grad_h_0", "grad_c_0")
NO_STATES, NO_GRADS = MappingProxyType(dict.fromkeys(STATES)), MappingProxyType(dict.fromkeys(GRADS_OF_STATES))


def _outermost(layer: Layer, states: Tensor, last: bool) -> Tensor:
    """Of the states of pieces ``[D, C, *]`` those that sequences begin with, or end with, ``[D, B, *]``."""
    return torch.stack([of.index_select(0, index) for of, index in zip(states, layer.outermost(last), strict=True)])


def _put_outermost(layer: Layer, states: Tensor, begins: Tensor) -> None:
    """The inverse of those that sequences begin with."""
    for of, index, begin in zip(states, layer.outermost(last=False), begins, strict=True):
        of.index_copy_(0, index, begin)


def _resident_forward(layer: Layer, gates_x, h_n, c_n, y, saved, save) -> None:
    # A tile reads its states before it writes them, so they may change in place.
    layer.launch(
        "resident_forward", (-(-layer.B // layer.tile.rows), layer.D), gates_x=gates_x, w_hh=layer.stacked("w_hh"),
        b_hh=layer.stacked("b_hh") if layer.bias else gates_x, h_0=h_n, c_0=c_n, y=y, h_n=h_n, c_n=c_n, saved=saved,
        BIAS=layer.bias, SAVE=save, PRECISION=layer.precision,
    )  # fmt: skip


def _stepwise_forward(layer: Layer, gates_x, h_n, c_n, y, saved, save, of_pieces=NO_STATES) -> None:
    """`of_pieces`: the states of all pieces; h_n and c_n are those that sequences begin with then."""
    D, B, H, P = layer.D, layer.B, layer.H, layer.P
    w_hh, b_hh = layer.stacked("w_hh").mT, layer.stacked("b_hh") if layer.bias else gates_x
    gates_h = y.new_empty(D, B, layer.G * H)
    h = h_n
    recurrent = layer.masks.recurrent
    factors = h_n if recurrent is None else (h_n * recurrent).to(y.dtype)
    if layer.projected:
        h, projected, w_hr = y.new_empty(D, B, H), y.new_empty(D, B, P), layer.stacked("w_hr").mT
    for k, rows in layer.steps():
        torch.bmm(factors[:, :rows], w_hh, out=gates_h[:, :rows])
        layer.launch(
            "step_forward", layer.grid(rows, H), gates_x=gates_x, gates_h=gates_h, b_hh=b_hh, h=h, c=c_n, y=y,
            saved=saved, factors=None if recurrent is None else factors, k=k, BIAS=layer.bias, SAVE=save,
            PROJECTED=layer.projected, NEEDS_H_PREV=layer.cell.needs_h_prev, **layer.of_pieces(), **of_pieces,
        )  # fmt: skip
        if layer.projected:
            torch.bmm(h[:, :rows], w_hr, out=projected[:, :rows])
            layer.launch("step_project", layer.grid(rows, P), projected=projected, h=h_n, y=y, k=k, P=P)


def _resident_backward(layer: Layer, grad_y, grad_h, grad_c, h_0, c_0, y, saved, grad_gates, _) -> None:
    layer.launch(
        "resident_backward", (-(-layer.B // layer.tile.rows), layer.D), grad_y=y if grad_y is None else grad_y,
        grad_h=grad_h, grad_c=grad_c, w_hh=layer.stacked("w_hh"), h_0=h_0, c_0=c_0, y=y, saved=saved,
        grad_gates=grad_gates, GRADS=layer.F, HAS_GRAD_Y=grad_y is not None,
        NEEDS_H_PREV=layer.cell.needs_h_prev, PRECISION=layer.precision,
    )  # fmt: skip


def _stepwise_backward(
    layer: Layer, grad_y, grad_h, grad_c, h_0, c_0, y, saved, grad_gates, grad_projected, of_pieces=NO_GRADS
) -> None:
    """`of_pieces`: the gradients of all pieces' states; grad_h and grad_c are those that sequences end with then."""
    D, B, H, P, projected = layer.D, layer.B, layer.H, layer.P, layer.projected
    w_hh, given = layer.stacked("w_hh"), grad_y is not None
    grad_y = grad_y if given else y
    grad_step = y.new_empty(D, B, layer.G * H)
    recurrent = layer.masks.recurrent
    grad_factors = grad_h if recurrent is None else torch.zeros_like(grad_h)
    grad_before_projection = grad_h
    if projected:
        grad_before_projection, grad_p, w_hr = y.new_empty(D, B, H), y.new_empty(D, B, P), layer.stacked("w_hr")
    for k, rows in layer.steps(back=True):
        if projected:
            layer.launch(
                "step_project_backward", layer.grid(rows, P), grad_y=grad_y, grad_h=grad_h,
                grad_projected=grad_projected, grad_step=grad_p, k=k, N=layer.N, P=P, HAS_GRAD_Y=given,
            )  # fmt: skip
            torch.bmm(grad_p[:, :rows], w_hr, out=grad_before_projection[:, :rows])
        layer.launch(
            "step_backward", layer.grid(rows, H), grad_y=grad_y, grad_h=grad_before_projection, grad_c=grad_c, h_0=h_0,
            c_0=c_0, y=y, saved=saved, grad_factors=None if recurrent is None else grad_factors,
            grad_gates=grad_gates, grad_step=grad_step, k=k,
            GRADS=layer.F, HAS_GRAD_Y=given and not projected, PROJECTED=projected,
            NEEDS_H_PREV=layer.cell.needs_h_prev, **layer.of_pieces(), **of_pieces,
        )  # fmt: skip
        grad_factors[:, :rows].baddbmm_(grad_step[:, :rows], w_hh)
    if recurrent is not None:
        grad_h.addcmul_(grad_factors, recurrent)


# ---- small things


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _copy(state: Tensor, dtype: torch.dtype) -> Tensor:
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def given_or_zeros(grad: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(shape, dtype=dtype) if grad is None else _copy(grad, dtype)
