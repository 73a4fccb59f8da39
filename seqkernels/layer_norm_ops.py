"""The operator pair of one layer with layer norm (docs/cells.md), beside any masks: the sweep over its steps.

What comes of the input is computed before it, for all rows at once, in torch operations (`forward`).

``layer_norm_forward.<backend>``, everything in float32 or float64
    gates_x ``[N, D, G*H]``: W_ih x where its sum with W_hh h is normalized (of_sum), else N(W_ih x; scale_ih) + b_ih
    w_hh ``[D, G*H, H]``, of k blocks ``[D, G*H, H/k]``
    scale, shift ``[D, G*H]``: of the norm of W_hh h or, of_sum, of the sum; shift is None without bias
    scale_c, shift_c ``[D, H]``: of the norm of an LSTM's c where h is read from it; None where there is no such
    h_0 ``[D, B, H]``, c_0 ``[D, B, H]`` (LSTM), batch_sizes: as of ``recurrence_forward``
    recurrent, candidate ``[D, B, H]``, zoneout_h, zoneout_c ``[N, D, H]``: `seqkernels.cell_options.Masks`
    launch: as of ``recurrence_forward``
    -> y ``[N, D*H]``, h_n ``[D, B, H]``, c_n ``[D, B, H]`` (else ``[D, B, 0]``), saved, statistics

saved ``[N, D, (G+S-1)*H]``: the products (of_sum: the sums) normalized, before their scale, and behind them the c of an
LSTM that is carried. statistics ``[N, D, 1]``: the 1 / sqrt(variance + 1e-5) that they were normalized by; with scale_c
``[N, D, 3]``, behind it the mean of c and c's 1 / sqrt(variance + 1e-5). c is normalized before zoneout. Gates are no
part of it: a backward pass has them of gates_x and what is saved. With ``save=False`` both are ``[N, D, 0]``.

``layer_norm_backward.<backend>``
    -> gradients of gates_x, w_hh, scale, shift, scale_c, shift_c, h_0 and c_0; empty ones, ``[0]``, of what is None,
    and with ``wants_w_hh=False`` of w_hh.

Masks have no gradients. A projection is none of this operator's, and blocks are the CPU's alone.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqkernels import flops, inplace
from seqkernels._ops import ops
from seqkernels.backends import autocast, cuda, torch_steps, triton
from seqkernels.backends.cells import CELLS
from seqkernels.backends.precision import to_acc
from seqkernels.backends.torch_steps import Direction, Variant
from seqkernels.cell_options import Masks
from seqkernels.double_backward import cut, derivatives
from seqkernels.hardware import THIS_MACHINE
from seqkernels.ops import reads_y, register
from seqkernels.select import Plan

_OF_LAYER = (
    "Tensor gates_x, Tensor w_hh, Tensor scale, Tensor? shift, Tensor? scale_c, Tensor? shift_c, Tensor h_0, "
    "Tensor? c_0, Tensor? batch_sizes, Tensor? recurrent, Tensor? candidate, Tensor? zoneout_h, Tensor? zoneout_c, "
    "bool of_sum"
)
FORWARD_SCHEMA = (
    f"(str cell, {_OF_LAYER}, bool save, int[] launch) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor statistics)"
)
BACKWARD_SCHEMA = (
    f"(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, {_OF_LAYER}, Tensor y, Tensor saved, "
    "Tensor statistics, bool wants_w_hh, int[] launch) "
    "-> (Tensor grad_gates_x, Tensor grad_w_hh, Tensor grad_scale, Tensor grad_shift, Tensor grad_scale_c, "
    "Tensor grad_shift_c, Tensor grad_h_0, Tensor grad_c_0)"
)

_library = torch.library.Library(ops.name, "FRAGMENT")


def forward(
    plan: Plan,
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    layer_norm: bool | str,
    masks: Masks,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator of the plan's backend -> y, h_n, c_n, in the dtype of x; save: gradients are wanted."""
    dtype = x.dtype
    x, h_0, c_0, *weights = to_acc(x, h_0, c_0, *weights)
    directions = torch_steps.directions_of(x, weights, to_acc(*norms), h_0.shape[0], layer_norm)
    gates_x = _stacked([of.of_x for of in directions], 1)
    parameters = (_stacked(tensors) for tensors in list(zip(*directions, strict=True))[1:-1])  # the last are w_hr
    of_layer = gates_x, *parameters, h_0, c_0, batch_sizes
    of_step = (mask if mask is None else mask.contiguous() for mask in masks[1:])
    results = getattr(ops.layer_norm_forward, plan.backend)(
        cell, *of_layer, *of_step, layer_norm == "gates", save, list(plan.launch) or [0]
    )
    y, h_n, c_n = (result.to(dtype) for result in results[:3])
    return y, h_n, c_n


def _stacked(tensors: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    """Those of all directions, if there are any."""
    present = [tensor for tensor in tensors if tensor is not None]
    return None if not present else present[0].unsqueeze(dim) if len(present) == 1 else torch.stack(present, dim)


def _backward_by(sweep_back: Callable, cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, *rest) -> tuple[Tensor, ...]:
    """The operator by a sweep, as csrc/layer_norm_arguments.h says what it gives."""
    *left, wants_w_hh, launch = rest
    grads = sweep_back(cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, *left, launch)
    grad_gates_x, grad_sums, factors, *others = grads
    of_sum = left[-4]
    grad_w_hh = _grad_w_hh(grad_sums, factors, w_hh) if wants_w_hh else w_hh.new_empty(0)
    return grad_sums if of_sum else grad_gates_x, grad_w_hh, *others


def _grad_w_hh(grad_sums: Tensor, factors: Tensor, w_hh: Tensor) -> Tensor:
    """From the gradients ``[N, D, G*H]`` of the products and h ``[N, D, H]`` before each step, as they have it."""
    (directions, _, units), blocks = w_hh.shape, _blocks_of(factors, w_hh)
    if blocks == 1:
        return torch.bmm(grad_sums.permute(1, 2, 0), factors.transpose(0, 1))
    of_blocks = factors.unflatten(2, (blocks, units)).permute(1, 2, 0, 3).flatten(0, 1)  # [D*k, N, H/k]
    grads = grad_sums.unflatten(2, (-1, blocks, units)).permute(1, 3, 2, 4, 0)  # [D, k, G, H/k, N]
    products = torch.bmm(grads.flatten(2, 3).flatten(0, 1), of_blocks)
    return products.view(directions, blocks, -1, units, units).transpose(1, 2).reshape(w_hh.shape)


def _blocks_of(h: Tensor, w_hh: Tensor) -> int:
    return h.shape[2] // w_hh.shape[2] if w_hh.shape[2] else 1


def _fake_forward(cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, *rest):
    (rows, directions, _), hidden_size, save = gates_x.shape, h_0.shape[2], rest[-2]
    saved = (CELLS[cell].gates + CELLS[cell].states - 1) * hidden_size
    return (
        gates_x.new_empty(rows, directions * hidden_size),
        h_0.new_empty(h_0.shape),
        h_0.new_empty(*h_0.shape[:2], 0 if c_0 is None else hidden_size),
        gates_x.new_empty(rows, directions, saved if save else 0),
        gates_x.new_empty(rows, directions, 0 if not save else 1 if scale_c is None else 3),
    )


def _fake_backward(cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, *rest):
    wants_w_hh, parameters = rest[-2], rest[:6]  # scale, ..., c_0
    return tuple(
        gates_x.new_empty(0 if tensor is None else tensor.shape)
        for tensor in (gates_x, w_hh if wants_w_hh else None, *parameters)
    )


def _save_for_backward(ctx, inputs, output) -> None:
    cell, *of_layer, of_sum, save, launch = inputs
    y, _, c_n, saved, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved, statistics, *([c_n] if of_layer[7] is None else []))
    ctx.cell, ctx.of_sum, ctx.launch = cell, of_sum, launch
    if save:
        ctx.changes, y = inplace.kept(y)
        ctx.save_for_backward(*of_layer, y, saved, statistics)


def _formula_of(backend: str):
    def formula(ctx, grad_y, grad_h_n, grad_c_n, *_):
        *of_layer, y, saved, statistics = ctx.saved_tensors
        h_0, _, batch_sizes = of_layer[6:9]
        if ctx.changes and ctx.changes.any() and reads_y(ctx.cell, y, h_0, batch_sizes):
            with torch.no_grad():
                y = getattr(ops.layer_norm_forward, backend)(ctx.cell, *of_layer, ctx.of_sum, False, ctx.launch)[0]
        left = ctx.of_sum, y, saved, statistics, ctx.needs_input_grad[2], ctx.launch
        grads = getattr(ops.layer_norm_backward, backend)(ctx.cell, grad_y, grad_h_n, grad_c_n, *of_layer, *left)
        needed = ctx.needs_input_grad[1:9]
        return None, *_where(needed, grads), *[None] * 7, None if ctx.launch else []

    return formula


def _where(needed: Sequence[bool], tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [tensor if need else None for need, tensor in zip(needed, tensors, strict=True)]


def _setup_double_backward(ctx, inputs, output) -> None:
    cell, *of_layer, of_sum, _, _, _, wants_w_hh, launch = inputs
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.of_sum, ctx.wants_w_hh, ctx.launch = cell, of_sum, wants_w_hh, launch
    ctx.save_for_backward(*of_layer)


def _double_backward(ctx, *grad_grads):
    """Differentiates the gradients of the layer in plain torch operations, of which what is saved is a function."""
    batch_sizes, *masks = ctx.saved_tensors[11:]
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list = cut(ctx.saved_tensors[:11], deeper)
        grads, of_layer, (h_0, c_0) = inputs[:3], inputs[3:], inputs[9:]
        variant = Variant("gates" if ctx.of_sum else True, _blocks_of(h_0, of_layer[1]), *masks)
        results = torch_steps.sweep(ctx.cell, _directions_of(*of_layer[:6]), h_0, c_0, batch_sizes, variant)
        wanted = [t for t in of_layer if t is not None]
        outputs: list = list(derivatives(results, grads, wanted, [True] * len(wanted), True))
    of_gates_x, of_w_hh, *of_others = grad_grads
    given = [of_gates_x, of_w_hh if ctx.wants_w_hh else None, *of_others]
    given = [grad for grad, t in zip(given, of_layer, strict=True) if t is not None]
    found = derivatives(outputs, given, inputs, ctx.needs_input_grad[1:12], deeper)
    return None, *found, *[None] * 10, None if ctx.launch else []


def _directions_of(gates_x: Tensor, *parameters: Tensor | None) -> list[Direction]:
    return [
        Direction(of_x, *(t if t is None else t[d] for t in parameters))  # type: ignore[arg-type]
        for d, of_x in enumerate(gates_x.unbind(1))
    ]


def _register(backend: str) -> None:
    forward, backward = (getattr(getattr(ops, name), backend) for name in ("layer_norm_forward", "layer_norm_backward"))
    register(forward, _fake_forward, (_formula_of(backend), _save_for_backward), _library)
    register(backward, _fake_backward, (_double_backward, _setup_double_backward), _library)


# Both passes of each backend that has them in Python; csrc/cpu/ops_layer_norm.cpp defines its own forward pass.
_PASSES: dict[str, tuple[Callable, Callable]] = {
    "cuda": (cuda.layer_norm_forward, functools.partial(_backward_by, cuda.layer_norm_sweep_back)),
    "triton": (triton.layer_norm_forward, triton.layer_norm_backward),
}
for _backend, (_forward, _backward) in _PASSES.items():
    for _name, _schema, _run in (
        ("layer_norm_forward", FORWARD_SCHEMA, _forward),
        ("layer_norm_backward", BACKWARD_SCHEMA, autocast.switched_off(_backward)),
    ):
        _library.define(f"{_name}.{_backend}{_schema}")
        _library.impl(f"{_name}.{_backend}", _run, "CompositeExplicitAutograd")
    _register(_backend)
if not THIS_MACHINE.native_missing:
    _by_cpu = functools.partial(_backward_by, ops.layer_norm_sweep_back)
    _library.define(f"layer_norm_backward.cpu{BACKWARD_SCHEMA}")
    _library.impl("layer_norm_backward.cpu", autocast.switched_off(_by_cpu), "CPU")
    _register("cpu")
flops.register(flops.LAYER_NORM)
