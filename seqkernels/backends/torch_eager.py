"""The operator pair in plain torch operations: any device, any floating dtype, differentiable as often as wanted.

This is the road for machines no kernel reaches, and the one double backward takes. The gate algebra below is the
only copy in Python outside the specification. 16-bit inputs are computed in float32, as the kernels do.
"""

import torch
from torch import Tensor

# Blocks of H columns in `saved`, per cell: the contract between any forward and any backward.
SAVED_BLOCKS = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}


def forward(
    cell: str,
    gates_x: Tensor,  # [N, D, G*H]
    w_hh: Tensor,  # [D, G*H, P]
    b_hh: Tensor | None,  # [D, G*H], GRU only
    w_hr: Tensor | None,  # [D, P, H]
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (rows, directions) = gates_x.dtype, gates_x.shape[:2]
    gates_x, w_hh, b_hh, w_hr, h_0, c_0 = _wide(gates_x, w_hh, b_hh, w_hr, h_0, c_0)
    steps = _steps(batch_sizes, rows, h_0.shape[1])
    ys, h_n, c_n, saveds = [], [], [], []
    for d in range(directions):
        h, c = h_0[d], h_0.new_zeros(h_0.shape[1], 0) if c_0 is None else c_0[d]
        y, saved = [], []
        for start, size in reversed(steps) if d else steps:
            h_t, c_t, kept = _step(
                cell,
                gates_x[start : start + size, d],
                h[:size] @ w_hh[d].T if b_hh is None else torch.addmm(b_hh[d], h[:size], w_hh[d].T),
                None if w_hr is None else w_hr[d],
                h[:size],
                c[:size],
            )
            y.append(h_t)
            saved.append(kept)
            # Sequences that have ended, or (backwards in time) not yet begun, keep their state.
            h, c = torch.cat([h_t, h[size:]]), torch.cat([c_t, c[size:]])
        ys.append(_in_rows(y[::-1] if d else y, rows, h_0.shape[2], h_0))
        saveds.append(_in_rows(saved[::-1] if d else saved, rows, SAVED_BLOCKS[cell] * _hidden_size(cell, w_hh), h_0))
        h_n.append(h)
        c_n.append(c)
    saved = torch.stack(saveds, 1) if save else h_0.new_zeros(rows, directions, 0)
    return torch.cat(ys, 1).to(dtype), torch.stack(h_n).to(dtype), torch.stack(c_n).to(dtype), saved.to(dtype)


def backward(
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [D, B, P]
    grad_c_n: Tensor | None,  # [D, B, H]
    gates_x: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P]
    saved: Tensor,  # [N, D, K*H]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (rows, directions) = gates_x.dtype, gates_x.shape[:2]
    grad_y, grad_h_n, grad_c_n, w_hh, w_hr, h_0, c_0, y, saved = _wide(
        grad_y, grad_h_n, grad_c_n, w_hh, w_hr, h_0, c_0, y, saved
    )
    steps = _steps(batch_sizes, rows, h_0.shape[1])
    sequences, projected, hidden = h_0.shape[1], h_0.shape[2], _hidden_size(cell, w_hh)
    extra = hidden if cell == "gru" else projected if w_hr is not None else 0
    grads_gates_x, grads_hidden, grads_h_0, grads_c_0 = [], [], [], []
    for d in range(directions):
        zeros = h_0.new_zeros(sequences, projected)
        grad_h = zeros if grad_h_n is None else grad_h_n[d]
        grad_c = h_0.new_zeros(sequences, 0 if c_0 is None else hidden)
        grad_c = grad_c if grad_c_n is None else grad_c_n[d]
        y_d, columns = y[:, d * projected : (d + 1) * projected], slice(d * projected, (d + 1) * projected)
        grad_gates_x, grad_hidden = [], []
        order = list(range(len(steps))) if d else list(range(len(steps)))[::-1]
        for t in order:
            start, size = steps[t]
            now = slice(start, start + size)
            h_prev = _previous(steps, t, d, y_d, h_0[d])
            c_prev = None if c_0 is None else _previous(steps, t, d, saved[:, d, 4 * hidden :], c_0[d])
            grad_h_t = grad_h[:size] if grad_y is None else grad_h[:size] + grad_y[now, columns]
            grad_x, grad_gates_h, grad_extra, direct, grad_c_t = _step_backward(
                cell,
                grad_h_t,
                grad_c[:size],
                saved[now, d],
                y_d[now],
                h_prev,
                c_prev,
                None if w_hr is None else w_hr[d],
            )
            grad_gates_x.append(grad_x)
            grad_hidden.append(grad_extra)
            grad_h = torch.cat([grad_gates_h @ w_hh[d] + direct, grad_h[size:]])
            grad_c = torch.cat([grad_c_t, grad_c[size:]])
        in_time = slice(None, None, None if d else -1)
        grads_gates_x.append(_in_rows(grad_gates_x[in_time], rows, gates_x.shape[2], h_0))
        grads_hidden.append(_in_rows(grad_hidden[in_time], rows, extra, h_0))
        grads_h_0.append(grad_h)
        grads_c_0.append(grad_c)
    return (
        torch.stack(grads_gates_x, 1).to(dtype),
        torch.stack(grads_hidden, 1).to(dtype),
        torch.stack(grads_h_0).to(dtype),
        torch.stack(grads_c_0).to(dtype),
    )


def _step(cell, gates_x, gates_h, w_hr, h, c):
    """One step of all running sequences -> (h, c, what `saved` keeps of it)."""
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3, 1), gates_h.chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (h - n), c, torch.cat([r, z, n, h_n], 1)
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4, 1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return (h if w_hr is None else h @ w_hr.T), c, torch.cat([i, f, g, o, c], 1)
    h = gates_x + gates_h
    return torch.tanh(h) if cell == "rnn_tanh" else torch.relu(h), c, h[:, :0]


def _step_backward(cell, grad_h, grad_c, saved, h, h_prev, c_prev, w_hr):
    """Gradients of one step: (of gates_x, of gates_h, for grad_hidden, of h_prev past the gates, of c_prev)."""
    if cell == "gru":
        r, z, n, h_n = saved.chunk(4, 1)
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_z = grad_h * (h_prev - n) * z * (1 - z)
        grad_r = grad_n * h_n * r * (1 - r)
        grad_hn = grad_n * r
        grad_rz = torch.cat([grad_r, grad_z], 1)
        return torch.cat([grad_rz, grad_n], 1), torch.cat([grad_rz, grad_hn], 1), grad_hn, grad_h * z, grad_c
    if cell == "lstm":
        grad_projected = grad_h
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
        grad_extra = grad_projected[:, :0] if w_hr is None else grad_projected
        return grad_gates, grad_gates, grad_extra, 0, grad_c * f
    grad_gates = grad_h * (1 - h * h) if cell == "rnn_tanh" else torch.where(h <= 0, 0, grad_h)
    return grad_gates, grad_gates, grad_gates[:, :0], 0, grad_c


def _steps(batch_sizes: Tensor | None, rows: int, sequences: int) -> list[tuple[int, int]]:
    """(first row, number of rows) of every step."""
    sizes = [sequences] * (rows // max(sequences, 1)) if batch_sizes is None else batch_sizes.tolist()
    steps, start = [], 0
    for size in sizes:
        steps.append((start, size))
        start += size
    return steps


def _previous(steps, t: int, direction: int, states: Tensor, initial: Tensor) -> Tensor:
    """States that step t started from: those of the step before it in its direction, else the initial ones."""
    size = steps[t][1]
    before = t + 1 if direction else t - 1
    if not 0 <= before < len(steps):
        return initial[:size]
    start, there = steps[before]
    there = min(there, size)
    return torch.cat([states[start : start + there], initial[there:size]])


def _in_rows(steps: list[Tensor], rows: int, columns: int, like: Tensor) -> Tensor:
    """Steps one after another as [rows, columns], zeros behind the last."""
    used = sum(len(step) for step in steps)
    return torch.cat([*steps, like.new_zeros(rows - used, columns)])


def _hidden_size(cell: str, w_hh: Tensor) -> int:
    return w_hh.shape[1] // {"gru": 3, "lstm": 4}.get(cell, 1)


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """16-bit tensors as float32."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
