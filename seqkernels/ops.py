"""The operator pair: recurrence_forward and recurrence_backward, one layer with all its directions.

``torch.ops.seqkernels.recurrence_forward.<backend>`` and its backward are overloads, one per backend, with one schema.
Schema, fake kernel, autograd formula and autocast rule stand here once; a backend only computes.

Letters, here and everywhere: T steps, B sequences, N rows, I input size, H hidden size, P projected size (H where
nothing is projected), G gates (RNN 1, GRU 3, LSTM 4), D directions, L layers, K blocks of saved state.

forward
    gates_x ``[N, D, G*H]``  W_ih x + b_ih, with b_hh added but for the GRU
    w_hh ``[D, G*H, P]``, b_hh ``[D, G*H]`` (GRU, whose reset gate scales a part of it)
    w_hr ``[D, P, H]`` (LSTM projection)
    h_0 ``[D, B, P]``, c_0 ``[D, B, H]`` (LSTM)
    batch_sizes ``[T]`` int64: running sequences per step, never rising, at most B, in sum at most N; None: always B.
    Rows behind the last step are not read, and come out as zeros. Sequences that never run keep their state.
    -> y ``[N, D*P]``, h_n ``[D, B, P]``, c_n ``[D, B, H]`` (else ``[D, B, 0]``), saved ``[N, D, K*H]``

`saved` is part of the contract, so any backend's forward pairs with any backend's backward: GRU r, z, n and
W_hn h + b_hn; LSTM i, f, g, o and c; RNN nothing (y is enough). With ``save=False`` it is ``[N, D, 0]``.

backward
    -> gradients of gates_x, h_0, c_0, and grad_hidden: for the GRU of W_hn h + b_hn ``[N, D, H]``, for a projected
    LSTM of the projected output ``[N, D, P]``, else ``[N, D, 0]``. Weight gradients are GEMMs over all rows, below.
"""

import torch
from torch import Tensor

from seqkernels.backends import torch_eager
from seqkernels.hardware import HERE

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}

FORWARD_SCHEMA = (
    "(str cell, Tensor gates_x, Tensor w_hh, Tensor? b_hh, Tensor? w_hr, Tensor h_0, Tensor? c_0, "
    "Tensor? batch_sizes, bool save) -> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)"
)
BACKWARD_SCHEMA = (
    "(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor gates_x, Tensor w_hh, Tensor? b_hh, "
    "Tensor? w_hr, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved) "
    "-> (Tensor grad_gates_x, Tensor grad_hidden, Tensor grad_h_0, Tensor grad_c_0)"
)

_library = torch.library.Library("seqkernels", "FRAGMENT")


def _fake_forward(cell, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes, save):
    rows, directions, columns = gates_x.shape
    blocks = torch_eager.SAVED_BLOCKS[cell] if save else 0
    return (
        gates_x.new_empty(rows, directions * h_0.shape[2]),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        h_0.new_empty(directions, h_0.shape[1], 0 if c_0 is None else c_0.shape[2]),
        gates_x.new_empty(rows, directions, blocks * (columns // GATES[cell])),
    )


def _fake_backward(cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes, y, saved):
    rows, directions, columns = gates_x.shape
    extra = columns // 3 if cell == "gru" else h_0.shape[2] if w_hr is not None else 0
    return (
        torch.empty_like(gates_x, memory_format=torch.contiguous_format),
        gates_x.new_empty(rows, directions, extra),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        h_0.new_empty(directions, h_0.shape[1], 0 if c_0 is None else c_0.shape[2]),
    )


def _setup_forward(ctx, inputs, output):
    cell, *tensors, save = inputs
    y, _, c_n, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((saved,) if cell == "lstm" else (c_n, saved)))
    ctx.cell, ctx.save = cell, save
    ctx.save_for_backward(*tensors, y, saved)


def _backward_of(backend: str):
    """The autograd formula of recurrence_forward: the backward operator of the same backend, then weight gradients."""

    def formula(ctx, grad_y, grad_h_n, grad_c_n, _):
        if not ctx.save:
            raise RuntimeError("recurrence_forward was called with save=False; its gradients need save=True")
        gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes, y, saved = ctx.saved_tensors
        if torch.is_grad_enabled() and w_hr is not None:
            # The gradient of w_hr reads `saved`, so a second derivative needs it as a function of the inputs.
            saved = torch_eager.forward(ctx.cell, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes, True)[3]
        operator = _BACKWARD[backend]
        args = ctx.cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, b_hh, w_hr, h_0, c_0, batch_sizes, y, saved
        differentiated = torch.is_grad_enabled() or torch.compiler.is_compiling()
        grad_gates_x, grad_hidden, grad_h_0, grad_c_0 = (
            operator(*args) if differentiated else _below_autograd(operator, *args)
        )
        grad_w_hh, grad_b_hh, grad_w_hr = _weight_gradients(
            ctx.cell, grad_gates_x, grad_hidden, w_hr, h_0, batch_sizes, y, saved
        )
        grad_b_hh = None if b_hh is None else grad_b_hh
        grad_c_0 = None if c_0 is None else grad_c_0
        return None, grad_gates_x, grad_w_hh, grad_b_hh, grad_w_hr, grad_h_0, grad_c_0, None, None

    return formula


def _setup_backward(ctx, inputs, output):
    cell, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.cell = cell
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *grads):
    """The autograd formula of recurrence_backward, for every backend: differentiate both passes of torch_eager.

    y and saved are functions of the other inputs, so all of the derivative is given to those.
    """
    *inputs, batch_sizes, _, _ = ctx.saved_tensors
    needed = ctx.needs_input_grad[1:10]
    deeper = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut this graph from the caller's, unless a still higher derivative is wanted.
        inputs = [
            t if t is None or not need else t.view_as(t) if deeper else t.detach().requires_grad_()
            for t, need in zip(inputs, needed, strict=True)
        ]
        y, _, _, saved = torch_eager.forward(ctx.cell, *inputs[3:], batch_sizes, True)
        outputs = torch_eager.backward(ctx.cell, *inputs, batch_sizes, y, saved)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    if not pairs:
        return (None,) * 13
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, wanted, grads, create_graph=deeper, allow_unused=True)
    found = iter(found)
    return (None, *(next(found) if need else None for need in needed), None, None, None)


def _weight_gradients(cell, grad_gates_x, grad_hidden, w_hr, h_0, batch_sizes, y, saved):
    """(of w_hh, b_hh, w_hr): each a GEMM or a sum over all rows."""
    directions, _, projected = h_0.shape
    hidden = grad_gates_x.shape[2] // GATES[cell]
    grad_w_hh, grad_w_hr = [], []
    for d in range(directions):
        y_d, grad = y[:, d * projected : (d + 1) * projected], grad_gates_x[:, d]
        grads = (grad[:, : 2 * hidden], grad_hidden[:, d]) if cell == "gru" else (grad,)
        grad_w_hh.append(torch.cat(_times_previous(grads, y_d, h_0[d], batch_sizes, reverse=d == 1)))
        if w_hr is not None:
            o, c = saved[:, d, 3 * hidden : 4 * hidden], saved[:, d, 4 * hidden :]
            grad_w_hr.append(grad_hidden[:, d].T @ (o * torch.tanh(c)))
    grad_b_hh = None
    if cell == "gru":
        grad_b_hh = torch.cat([grad_gates_x[:, :, : 2 * hidden].sum(0), grad_hidden.sum(0)], 1)
    return _stack(grad_w_hh), grad_b_hh, None if w_hr is None else _stack(grad_w_hr)


def _stack(directions: list[Tensor]) -> Tensor:
    return directions[0].unsqueeze(0) if len(directions) == 1 else torch.stack(directions)


def _times_previous(grads, y: Tensor, h_0: Tensor, batch_sizes: Tensor | None, reverse: bool) -> list[Tensor]:
    """grad^T h_prev of each grad ``[N, *]``, where h_prev ``[N, P]`` holds the state each row started from."""
    rows, sequences = y.shape[0], h_0.shape[0]
    if rows == 0:
        return [h_0.new_zeros(grad.shape[1], h_0.shape[1]) for grad in grads]
    if batch_sizes is None:
        # h_prev is y moved by one step, so no row need be copied.
        split = rows - sequences if reverse else sequences
        first, later = (slice(split, rows), slice(0, split)) if reverse else (slice(0, split), slice(split, rows))
        y_prev = y[sequences:] if reverse else y[: rows - sequences]
        return [torch.addmm(grad[first].T @ h_0, grad[later].T, y_prev) for grad in grads]
    h_prev = torch.cat([y, h_0]).index_select(0, _rows_before(batch_sizes, rows, reverse).to(y.device))
    return [grad.T @ h_prev for grad in grads]


def _rows_before(batch_sizes: Tensor, rows: int, reverse: bool) -> Tensor:
    """For each row, the row of [y; h_0] that holds the state it started from. ``[N]``"""
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows, device=batch_sizes.device)
    step = torch.searchsorted(ends, row, right=True)
    used = step < batch_sizes.shape[0]
    step = step.clamp(max=batch_sizes.shape[0] - 1)
    start = (ends - batch_sizes)[step]
    if reverse:
        following = torch.cat([batch_sizes[1:], batch_sizes.new_zeros(1)])[step]
        before = torch.where(row - start < following, row + batch_sizes[step], rows + row - start)
    else:
        before = torch.where(step > 0, row - batch_sizes.roll(1)[step], rows + row)
    # Rows that no step uses have zero gradients; they may read any row that exists.
    return torch.where(used, before, row)


def _cast_for_autocast(operator, device_type: str):
    """The autocast rule: every floating tensor in autocast's dtype (float64 is left alone), as for torch's matmul."""

    def cast(value, dtype):
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def rule(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.amp.autocast(device_type, enabled=False):
            return operator(*(cast(arg, dtype) for arg in args))

    return rule


def _register(backend: str) -> None:
    """Everything about a backend's pair of operators that is the same for all backends."""
    forward, backward = f"seqkernels::recurrence_forward.{backend}", f"seqkernels::recurrence_backward.{backend}"
    torch.library.register_fake(forward, _fake_forward, lib=_library)
    torch.library.register_fake(backward, _fake_backward, lib=_library)
    torch.library.register_autograd(forward, _backward_of(backend), setup_context=_setup_forward, lib=_library)
    torch.library.register_autograd(backward, _double_backward, setup_context=_setup_backward, lib=_library)
    for name in ("recurrence_forward", "recurrence_backward"):
        operator = getattr(getattr(torch.ops.seqkernels, name), backend)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _library.impl(f"{name}.{backend}", _cast_for_autocast(operator, device_type), key)


_library.define("recurrence_forward.torch_eager" + FORWARD_SCHEMA)
_library.define("recurrence_backward.torch_eager" + BACKWARD_SCHEMA)
_library.impl("recurrence_forward.torch_eager", torch_eager.forward, "CompositeExplicitAutograd")
_library.impl("recurrence_backward.torch_eager", torch_eager.backward, "CompositeExplicitAutograd")
_backends = ["torch_eager"] + (["cpu"] if HERE.native else [])  # csrc/library.cpp defines and implements "cpu"
for _backend in _backends:
    _register(_backend)

_FORWARD = {backend: getattr(torch.ops.seqkernels.recurrence_forward, backend) for backend in _backends}
_BACKWARD = {backend: getattr(torch.ops.seqkernels.recurrence_backward, backend) for backend in _backends}


class _Recurrence(torch.autograd.Function):
    """The registered autograd formula without torch.library's way to it, which costs 40 us a call."""

    @staticmethod
    def forward(ctx, backend, *args):
        output = _below_autograd(_FORWARD[backend], *args)
        _setup_forward(ctx, args, output)
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, *_backward_of(ctx.backend)(ctx, *grads)


def _below_autograd(operator, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def recurrence_forward(backend: str, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator of `backend`, by the shortest way there is.

    Compiled code and autocast need the operator itself; a transform, which cannot pass an operator, its plain torch
    operations.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        return _FORWARD[backend](*args)
    if transformed():
        return torch_eager.forward(*args)
    save = args[-1]
    return _Recurrence.apply(backend, *args) if save else _below_autograd(_FORWARD[backend], *args)


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
