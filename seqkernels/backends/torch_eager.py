"""The operator pair in plain torch operations: any device, differentiable as often as wanted.

It runs where no kernel does, and double backward is computed through it. The gate algebra below is the
only copy in torch operations beside the specification. 16-bit inputs are computed in float32, as the kernels do.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.backends import stack
from seqkernels.backends.arguments import Weights, by_direction, check, check_backward
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.precision import NATIVE_DTYPES, to_acc
from seqkernels.hardware import Machine

DESCRIPTION = "plain torch operations run anywhere; slower than torch.nn where torch has a fused kernel"


def unsupported(call: Call, machine: Machine) -> str | None:
    return None if call.dtype in NATIVE_DTYPES else f"torch computes nothing in {call.dtype}"


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return None


def estimate(call: Call, machine: Machine) -> float | None:
    return None


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    return ()


def kernel(call: Call, machine: Machine) -> str:
    return f"{', '.join(call.options)}: a step at a time in plain torch operations" if call.options else ""


def _forward(cell, x, weights, h_0, c_0, batch_sizes, save, _) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer."""
    dtype, rows, directions = x.dtype, x.shape[0], h_0.shape[0]
    x, h_0, c_0, *weights = to_acc(x, h_0, c_0, *weights)
    steps = steps_of(batch_sizes, rows, h_0.shape[1])
    ys, h_n, c_n, saveds = [], [], [], []
    for d, w in enumerate(by_direction(weights, directions)):
        gates_x = F.linear(x, w.w_ih, w.b_ih)
        h, c = h_0[d], h_0.new_zeros(h_0.shape[1], 0) if c_0 is None else c_0[d]
        y, saved = [], []
        for start, size in reversed(steps) if d else steps:
            gates_h = F.linear(h[:size], w.w_hh, w.b_hh)
            h_t, c_t, kept = step(cell, gates_x[start : start + size], gates_h, w.w_hr, h[:size], c[:size])
            y.append(h_t)
            saved.append(kept)
            # Sequences that have ended, or (backwards in time) not yet begun, keep their state.
            h, c = torch.cat([h_t, h[size:]]), torch.cat([c_t, c[size:]])
        ys.append(in_rows(y[::-1] if d else y, rows, h_0.shape[2], h_0))
        saveds.append(in_rows(saved[::-1] if d else saved, rows, CELLS[cell].saved_blocks * _hidden_size(cell, w), h_0))
        h_n.append(h)
        c_n.append(c)
    all_saved = torch.stack(saveds, 1) if save else h_0.new_zeros(rows, directions, 0)
    return torch.cat(ys, 1).to(dtype), torch.stack(h_n).to(dtype), torch.stack(c_n).to(dtype), all_saved.to(dtype)


def _backward(
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, _
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """One layer."""
    dtype, rows, directions = x.dtype, x.shape[0], h_0.shape[0]
    grad_y, grad_h_n, grad_c_n, x, h_0, c_0, y, saved, *weights = to_acc(
        grad_y, grad_h_n, grad_c_n, x, h_0, c_0, y, saved, *weights
    )
    steps = steps_of(batch_sizes, rows, h_0.shape[1])
    projected, used = h_0.shape[2], sum(size for _, size in steps)
    grads_x, grad_weights, grads_h_0, grads_c_0 = [], [], [], []
    for d, w in enumerate(by_direction(weights, directions)):
        columns = slice(d * projected, (d + 1) * projected)
        grad_gates_x, grad_gates_h, grad_projected, grad_h_0, grad_c_0 = _sweep_back(
            cell,
            None if grad_y is None else grad_y[:, columns],
            torch.zeros_like(h_0[d]) if grad_h_n is None else grad_h_n[d],
            grad_c_n if c_0 is None or grad_c_n is None else grad_c_n[d],
            w,
            h_0[d],
            None if c_0 is None else c_0[d],
            steps,
            y[:, columns],
            saved[:, d],
            reverse=d == 1,
        )
        if wants_x:
            grads_x.append(grad_gates_x @ w.w_ih)
        if wants_weights:
            h_prev = all_previous(steps, d == 1, y[:, columns], h_0[d])
            grad_weights += [grad_gates_x[:used].T @ x[:used], grad_gates_h.T @ h_prev]
            if w.b_ih is not None:
                grad_weights += [grad_gates_x.sum(0), grad_gates_h.sum(0)]
            if w.w_hr is not None:
                o, c = saved[:, d].chunk(5, 1)[3:]
                grad_weights.append(grad_projected.T @ (o * torch.tanh(c)))
        grads_h_0.append(grad_h_0)
        grads_c_0.append(grad_c_0)
    return (
        sum(grads_x, h_0.new_zeros(())).to(dtype) if wants_x else x.new_zeros(0, dtype=dtype),
        [grad.to(dtype) for grad in grad_weights] or [x.new_zeros(0, dtype=dtype) for _ in weights],
        torch.stack(grads_h_0).to(dtype),
        torch.stack(grads_c_0).to(dtype),
    )


forward = functools.partial(stack.forward, _forward)
backward = functools.partial(stack.backward, _backward)


def checked_forward(cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers):
    """The operator."""
    check(cell, x, weights, h_0, c_0, batch_sizes, layers)
    return forward(cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers)


def checked_backward(
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, launch,
    layers,
):  # fmt: skip
    """The operator."""
    grads, of_stack = (grad_y, grad_h_n, grad_c_n), (x, weights, h_0, c_0)
    check(cell, *of_stack, batch_sizes, layers)
    check_backward(cell, grads, *of_stack, y, saved, layers)
    return backward(cell, *grads, *of_stack, batch_sizes, y, saved, wants_x, wants_weights, launch, layers)


def _sweep_back(cell, grad_y, grad_h, grad_c, w: Weights, h_0, c_0, steps, y, saved, reverse: bool):
    """One direction back through time: gradients (of gates_x, of gates_h, of the projected h: all [N, *], of h_0, of
    c_0)."""
    rows, hidden = y.shape[0], _hidden_size(cell, w)
    if grad_c is None:
        grad_c = h_0.new_zeros(h_0.shape[0], 0 if c_0 is None else hidden)
    grads_x, grads_h, grads_projected = [], [], []
    order = list(range(len(steps)))
    for t in order if reverse else order[::-1]:
        start, size = steps[t]
        now = slice(start, start + size)
        h_prev = _previous(steps, t, reverse, y, h_0)
        c_prev = None if c_0 is None else _previous(steps, t, reverse, saved[:, -hidden:], c_0)  # c is the last block
        grad_h_t = grad_h[:size] if grad_y is None else grad_h[:size] + grad_y[now]
        grad_x, grad_gates_h, direct, grad_c_t = _step_backward(
            cell, grad_h_t, grad_c[:size], saved[now], y[now], h_prev, c_prev, w.w_hr
        )
        grads_x.append(grad_x)
        grads_h.append(grad_gates_h)
        grads_projected.append(grad_h_t)
        grad_h = torch.cat([grad_gates_h @ w.w_hh + direct, grad_h[size:]])
        grad_c = torch.cat([grad_c_t, grad_c[size:]])
    in_time = slice(None, None, None if reverse else -1)
    gates = CELLS[cell].gates * hidden
    return (
        in_rows(grads_x[in_time], rows, gates, h_0),
        in_rows(grads_h[in_time], rows, gates, h_0),
        in_rows(grads_projected[in_time], rows, h_0.shape[1], h_0),
        grad_h,
        grad_c,
    )


def step(cell, gates_x, gates_h, w_hr, h, c, candidate=None, norm_c=None):
    """One step of all running sequences -> (h, c, what `saved` keeps of it).

    What multiplies the candidate, and the norm of c, are those of cells with options (`torch_steps`).
    """

    def dropped(new: Tensor) -> Tensor:
        return new if candidate is None else new * candidate

    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3, 1), gates_h.chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        new = dropped(n)
        return new + z * (h - new), c, torch.cat([r, z, n, h_n], 1)
    if cell == "lstm":
        i, f, g, o = lstm_gates(gates_x + gates_h)
        c = f * c + i * dropped(g)
        h = o * torch.tanh(c if norm_c is None else norm_c(c))
        return (h if w_hr is None else h @ w_hr.T), c, torch.cat([i, f, g, o, c], 1)
    if cell == "ligru":
        a, z = (gates_x + gates_h).chunk(2, 1)
        a, z = torch.relu(a), torch.sigmoid(z)
        return z * h + (1 - z) * dropped(a), c, torch.cat([a, z], 1)
    h = gates_x + gates_h
    return torch.tanh(h) if cell == "rnn_tanh" else torch.relu(h), c, h[:, :0]


def lstm_gates(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i, f, g and o ``[N, H]`` from the sums ``[N, 4*H]`` of their products and biases."""
    i, f, g, o = sums.chunk(4, 1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def _step_backward(cell, grad_h, grad_c, saved, h, h_prev, c_prev, w_hr):
    """Gradients of one step: (of gates_x, of gates_h, of h_prev past the gates, of c_prev)."""
    if cell == "gru":
        r, z, n, h_n = saved.chunk(4, 1)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_z = grad_h * (h_prev - n) * z * (1 - z)
        grad_r = grad_n * h_n * r * (1 - r)
        grad_rz = torch.cat([grad_r, grad_z], 1)
        return torch.cat([grad_rz, grad_n], 1), torch.cat([grad_rz, grad_n * r], 1), grad_h * z, grad_c
    if cell == "lstm":
        grad_h = grad_h if w_hr is None else grad_h @ w_hr
        i, f, g, o, c = saved.chunk(5, 1)
        tanh_c = torch.tanh(c)
        grad_c = grad_c + grad_h * o * (1 - tanh_c * tanh_c)
        grad_gates = torch.cat(
            [
                grad_c * g * i * (1 - i),
                grad_c * c_prev * f * (1 - f),
                grad_c * i * (1 - g * g),
                grad_h * tanh_c * o * (1 - o),
            ],
            1,
        )
        return grad_gates, grad_gates, 0, grad_c * f
    if cell == "ligru":
        a, z = saved.chunk(2, 1)
        grad_a = torch.where(a <= 0, 0, grad_h * (1 - z))
        grad_gates = torch.cat([grad_a, grad_h * (h_prev - a) * z * (1 - z)], 1)
        return grad_gates, grad_gates, grad_h * z, grad_c
    grad_gates = grad_h * (1 - h * h) if cell == "rnn_tanh" else torch.where(h <= 0, 0, grad_h)
    return grad_gates, grad_gates, 0, grad_c


def steps_of(batch_sizes: Tensor | None, rows: int, sequences: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of every step."""
    if batch_sizes is None:
        # Within transforms and compilers tensors may have no numbers; else torch raises the error for too many steps.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return [(t * sequences, sequences) for t in range(rows // max(sequences, 1))]
        batch_sizes = torch.full((rows // max(sequences, 1),), sequences, device="cpu")
    starts = batch_sizes.cumsum(0) - batch_sizes
    return list(zip(_numbers(starts), _numbers(batch_sizes), strict=True))


def _numbers(tensor: Tensor) -> list[int]:
    """Within torch.func.functionalize a tensor has no memory for tolist() to read."""
    return [int(number) for number in tensor] if torch._C._are_functorch_transforms_active() else tensor.tolist()


def _previous(steps, t: int, reverse: bool, states: Tensor, initial: Tensor) -> Tensor:
    """States that step t started from: those of the step before it in its direction, else the initial ones."""
    size = steps[t][1]
    before = t + 1 if reverse else t - 1
    if not 0 <= before < len(steps):
        return initial[:size]
    start, there = steps[before]
    there = min(there, size)
    return torch.cat([states[start : start + there], initial[there:size]])


def all_previous(steps, reverse: bool, states: Tensor, initial: Tensor) -> Tensor:
    """For every row the state it started from; zeros for rows that no step uses."""
    previous = [_previous(steps, t, reverse, states, initial) for t in range(len(steps))]
    return in_rows(previous, states.shape[0], states.shape[1], initial)


def in_rows(steps: list[Tensor], rows: int, columns: int, like: Tensor) -> Tensor:
    """Steps one after another as [rows, columns], zeros behind the last."""
    used = sum(len(step) for step in steps)
    return torch.cat([*steps, like.new_zeros(rows - used, columns)])


def _hidden_size(cell: str, w: Weights) -> int:
    return w.w_hh.shape[0] // CELLS[cell].gates
