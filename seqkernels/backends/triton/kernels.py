"""The Triton kernels: whole sequences with the recurrent weights on chip, and single steps between matrix products.

Letters as in ``seqkernels.ops``; G and K are called GATES and SAVED here, and GRADS are the blocks of grad_gates. A
tile is ``[UNITS, ROWS]``: hidden units by sequences, so that a step reads as the mathematics does, W h + b, and the
weights are the left factor, which tensor cores read best. UNITS is a power of two, in the resident kernels at least H;
what lies beyond H or B is masked, and zero wherever it enters a product. Gates, states and sums are float32, factors
have the dtype of the weights.

The formulas of the cells stand in ``algebra.py``, and where a tile's numbers lie in ``memory.py``. Only the host side,
``layer.py``, imports this file.
"""

import triton
import triton.language as tl

from seqkernels.backends.triton.algebra import cell_backward, cell_forward, product, store, to_acc
from seqkernels.backends.triton.memory import (
    load_blocks,
    load_step,
    load_weights,
    load_x,
    rows_of_step,
    step_of,
    steps_of_tile,
    store_blocks,
)

# Sizes change from call to call: no kernel is compiled again because one is a multiple of 16, or 1.
kernel = triton.jit(do_not_specialize=["T", "B", "N", "k"])


# ---- resident: a program walks all steps of its tile


@kernel
def resident_forward(
    gates_x,  # [D, N, G*H], with b_ih
    w_hh,  # [D, G*H, H]
    b_hh,  # [D, G*H]
    h_0, c_0,  # [D, B, H]
    starts, sizes,  # [T] int64
    y,  # [N, D*H]
    h_n, c_n,  # [D, B, H]; may be h_0 and c_0 themselves
    saved,  # [N, D, K*H]
    T, B, N, CELL: tl.constexpr, HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
    SAVED: tl.constexpr, RAGGED: tl.constexpr, BIAS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    here = (first + lane < B) & (unit < H)
    state = (direction * B + first) * H + (lane * H + unit)
    h = tl.load(h_0 + state, here, 0.0).to(tl.float32)
    c = tl.zeros([UNITS, ROWS], tl.float32)
    if HAS_C:
        c = tl.load(c_0 + state, here, 0.0)
    w_0, w_1, w_2, w_3 = load_weights(w_hh + direction * GATES * H * H, UNITS, H, GATES, False)
    b_0, b_1, b_2, b_3 = 0.0, 0.0, 0.0, 0.0
    if BIAS:
        b_0, b_1, b_2, b_3 = load_blocks(b_hh + direction * GATES * H, unit, unit < H, H, GATES)

    steps = steps_of_tile(sizes, first, T, RAGGED)
    t = step_of(0, steps, direction)
    at, running, x_0, x_1, x_2, x_3 = load_x(
        gates_x, starts, sizes, t, direction, first, lane, unit, here, T, B, N, H, GATES, RAGGED
    )
    for k in range(steps):
        # One step ahead, so that reading overlaps with the products.
        t = step_of(k + 1, steps, direction)
        next_at, next_running, next_0, next_1, next_2, next_3 = load_x(
            gates_x, starts, sizes, t, direction, first, lane, unit, here, T, B, N, H, GATES, RAGGED
        )
        a_0 = product(w_0, h, PRECISION) + b_0
        a_1, a_2, a_3 = a_0, a_0, a_0
        if GATES > 1:
            a_1 = product(w_1, h, PRECISION) + b_1
        if GATES > 2:
            a_2 = product(w_2, h, PRECISION) + b_2
        if GATES > 3:
            a_3 = product(w_3, h, PRECISION) + b_3
        h_t, c_t, s_0, s_1, s_2, s_3 = cell_forward(x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h, c, CELL)
        # Sequences that have ended, or (backwards in time) not yet begun, keep their state.
        h, c = tl.where(running, h_t, h), tl.where(running, c_t, c)
        place = at * D + direction
        store(y + place * H + (lane * D * H + unit), h, running)
        if SAVE and SAVED > 0:
            in_row = lane * D * SAVED * H + unit
            store_blocks(saved + place * SAVED * H, in_row, running, H, s_0, s_1, s_2, s_3, SAVED)
            if HAS_C:
                store(saved + (place * SAVED + SAVED - 1) * H + in_row, c, running)
        at, running, x_0, x_1, x_2, x_3 = next_at, next_running, next_0, next_1, next_2, next_3
    store(h_n + state, h, here)
    if HAS_C:
        store(c_n + state, c, here)


@kernel
def resident_backward(
    grad_y,  # [N, D*H]
    grad_h, grad_c,  # [D, B, H] float32: of h_n and c_n, and then of h_0 and c_0
    w_hh, h_0, c_0,  # both states [D, B, H], in the dtype of the layer
    starts, sizes, y, saved,
    grad_gates,  # [D, N, GRADS*H], blocks as cell_backward has them
    T, B, N, CELL: tl.constexpr, HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    GATES: tl.constexpr, SAVED: tl.constexpr, RAGGED: tl.constexpr, GRADS: tl.constexpr, HAS_GRAD_Y: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    here = (first + lane < B) & (unit < H)
    state = (direction * B + first) * H + (lane * H + unit)
    grad_h_t = tl.load(grad_h + state, here, 0.0)
    grad_c_t = tl.zeros([UNITS, ROWS], tl.float32)
    if HAS_C:
        grad_c_t = tl.load(grad_c + state, here, 0.0)
    w_0, w_1, w_2, w_3 = load_weights(w_hh + direction * GATES * H * H, UNITS, H, GATES, True)

    steps = steps_of_tile(sizes, first, T, RAGGED)
    t = step_of(steps - 1, steps, direction)
    at, running, grad, s_0, s_1, s_2, s_3, now, before = load_step(
        grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
        HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y,
    )  # fmt: skip
    for k in range(steps):
        t = step_of(steps - 2 - k, steps, direction)
        next_at, next_running, next_grad, next_0, next_1, next_2, next_3, next_now, next_before = load_step(
            grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
            HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y,
        )  # fmt: skip
        total = grad_h_t
        if HAS_GRAD_Y:
            total += grad.to(tl.float32)
        s_0, s_1, s_2, s_3, now, before = to_acc(s_0, s_1, s_2, s_3, now, before)
        g_0, g_1, g_2, g_3, total, grad_c_before = cell_backward(total, grad_c_t, s_0, s_1, s_2, s_3, now, before, CELL)
        total += product(w_0, tl.where(running, g_0, 0.0), PRECISION)
        if GATES > 1:
            total += product(w_1, tl.where(running, g_1, 0.0), PRECISION)
        if GATES > 2:
            total += product(w_2, tl.where(running, g_2, 0.0), PRECISION)
        if GATES > 3:
            total += product(w_3, tl.where(running, g_3, 0.0), PRECISION)
        place = grad_gates + (direction * N + at) * GRADS * H
        store_blocks(place, lane * GRADS * H + unit, running, H, g_0, g_1, g_2, g_3, GRADS)
        grad_h_t, grad_c_t = tl.where(running, total, grad_h_t), tl.where(running, grad_c_before, grad_c_t)
        at, running, grad, now, before = next_at, next_running, next_grad, next_now, next_before
        s_0, s_1, s_2, s_3 = next_0, next_1, next_2, next_3
    store(grad_h + state, grad_h_t, here)
    if HAS_C:
        store(grad_c + state, grad_c_t, here)


# ---- stepwise: the host multiplies, a kernel does the rest of the k-th step of every direction


@kernel
def step_forward(
    gates_x,  # [D, N, G*H]
    gates_h,  # [D, B, G*H], the product alone
    b_hh,  # [D, G*H]
    h,  # [D, B, H], changed in place; with a projection what is to be projected
    c,  # [D, B, H] float32, changed in place
    starts, sizes, y, saved, k, T, B, N, CELL: tl.constexpr, HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, SAVE: tl.constexpr, PROJECTED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    here = (first + lane < B) & (unit < H)
    at, running, x_0, x_1, x_2, x_3 = load_x(
        gates_x, starts, sizes, step_of(k, T, direction), direction, first, lane, unit, here, T, B, N, H, GATES, RAGGED
    )
    of_state = direction * B + first
    state = of_state * H + (lane * H + unit)
    a_0, a_1, a_2, a_3 = load_blocks(gates_h + of_state * GATES * H, lane * GATES * H + unit, running, H, GATES)
    b_0, b_1, b_2, b_3 = 0.0, 0.0, 0.0, 0.0
    if BIAS:
        b_0, b_1, b_2, b_3 = load_blocks(b_hh + direction * GATES * H, unit, unit < H, H, GATES)
    a_0, a_1 = a_0.to(tl.float32) + b_0, a_1.to(tl.float32) + b_1
    a_2, a_3 = a_2.to(tl.float32) + b_2, a_3.to(tl.float32) + b_3
    h_t, c_t = a_0, a_0
    if NEEDS_H_PREV:
        h_t = tl.load(h + state, running, 0.0).to(tl.float32)
    if HAS_C:
        c_t = tl.load(c + state, running, 0.0)
    h_t, c_t, s_0, s_1, s_2, s_3 = cell_forward(x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h_t, c_t, CELL)
    place = at * D + direction
    store(h + state, h_t, running)
    if not PROJECTED:
        store(y + place * H + (lane * D * H + unit), h_t, running)
    if HAS_C:
        store(c + state, c_t, running)
    if SAVE and SAVED > 0:
        in_row = lane * D * SAVED * H + unit
        store_blocks(saved + place * SAVED * H, in_row, running, H, s_0, s_1, s_2, s_3, SAVED)
        if HAS_C:
            store(saved + (place * SAVED + SAVED - 1) * H + in_row, c_t, running)


@kernel
def step_project(
    projected,  # [D, B, P]
    h,  # [D, B, P], changed in place
    starts, sizes,
    y,  # [N, D*P]
    k, T, B, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Write the projected h of the sequences that run into their state and into y."""
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    start, size = rows_of_step(starts, sizes, step_of(k, T, direction), T, B, RAGGED)
    running = (first + lane < size) & (unit < P)
    state = (direction * B + first) * P + (lane * P + unit)
    h_t = tl.load(projected + state, running, 0.0)
    store(h + state, h_t, running)
    store(y + ((start + first) * D + direction) * P + (lane * D * P + unit), h_t, running)


@kernel
def step_backward(
    grad_y,
    grad_h,  # [D, B, H]; not projected, it becomes the gradient of h before the step, but for the product with w_hh
    grad_c,  # [D, B, H] float32, changed in place
    h_0,  # [D, B, H]
    c_0, starts, sizes, y, saved,
    grad_gates,  # [D, N, GRADS*H]
    grad_step,  # [D, B, G*H] gradients of the gates of h; zeros for sequences that do not run
    k, T, B, N, CELL: tl.constexpr, HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    GATES: tl.constexpr, SAVED: tl.constexpr, RAGGED: tl.constexpr, GRADS: tl.constexpr, HAS_GRAD_Y: tl.constexpr,
    PROJECTED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    here = (first + lane < B) & (unit < H)
    at, running, grad, s_0, s_1, s_2, s_3, now, before = load_step(
        grad_y, y, saved, h_0, c_0, starts, sizes, step_of(k, T, direction), direction, first, lane, unit, here, T, B,
        HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y,
    )  # fmt: skip
    of_state = direction * B + first
    state = of_state * H + (lane * H + unit)
    total = tl.load(grad_h + state, running, 0.0).to(tl.float32)
    if HAS_GRAD_Y:
        total += grad.to(tl.float32)
    grad_c_t = total
    if HAS_C:
        grad_c_t = tl.load(grad_c + state, running, 0.0)
    s_0, s_1, s_2, s_3, now, before = to_acc(s_0, s_1, s_2, s_3, now, before)
    g_0, g_1, g_2, g_3, total, grad_c_t = cell_backward(total, grad_c_t, s_0, s_1, s_2, s_3, now, before, CELL)
    store_blocks(
        grad_gates + (direction * N + at) * GRADS * H, lane * GRADS * H + unit, running, H, g_0, g_1, g_2, g_3, GRADS
    )
    g_0, g_1 = tl.where(running, g_0, 0.0), tl.where(running, g_1, 0.0)
    g_2, g_3 = tl.where(running, g_2, 0.0), tl.where(running, g_3, 0.0)
    store_blocks(grad_step + of_state * GATES * H, lane * GATES * H + unit, here, H, g_0, g_1, g_2, g_3, GATES)
    if not PROJECTED:
        store(grad_h + state, total, running)
    if HAS_C:
        store(grad_c + state, grad_c_t, running)


@kernel
def step_project_backward(
    grad_y,  # [N, D*P]
    grad_h,  # [D, B, P], zero afterwards where a sequence runs
    starts, sizes,
    grad_projected,  # [D, N, P]
    grad_step,  # [D, B, P] the same of this step; zeros for sequences that do not run
    k, T, B, N, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, HAS_GRAD_Y: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The gradient of the projected h: what came back through time and what came from y."""
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    here = (first + lane < B) & (unit < P)
    start, size = rows_of_step(starts, sizes, step_of(k, T, direction), T, B, RAGGED)
    at, running = start + first, here & (first + lane < size)
    state = (direction * B + first) * P + (lane * P + unit)
    total = tl.load(grad_h + state, running, 0.0).to(tl.float32)
    if HAS_GRAD_Y:
        total += tl.load(grad_y + (at * D + direction) * P + (lane * D * P + unit), running, 0.0).to(tl.float32)
    store(grad_projected + (direction * N + at) * P + (lane * P + unit), total, running)
    store(grad_step + state, total, here)
    store(grad_h + state, tl.zeros_like(total), running)
