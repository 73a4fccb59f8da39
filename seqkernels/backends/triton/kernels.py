"""The resident Triton kernels: a program walks all steps of its tile with the recurrent weights on chip. Those of
single steps stand in ``stepwise.py``.

Letters as in ``seqkernels.ops``; G and K are called GATES and SAVED here, and GRADS are the blocks of grad_gates. A
tile is ``[UNITS, ROWS]``: hidden units by sequences, so that a step reads as the mathematics does, W h + b, and the
weights are the left factor, which tensor cores read best. UNITS is a power of two, in the resident kernels at least H;
what lies beyond H or B is masked, and zero wherever it enters a product. Gates, states, masks and sums are float32,
factors have the dtype of the weights. Masks of cells with options (``seqkernels.masked_ops``) are None where there are
none, and then no code.

The formulas of the cells stand in ``algebra.py``, and where a tile's numbers lie in ``memory.py``. Only the host side,
``layer.py``, imports these files.
"""

import triton.language as tl

from seqkernels.backends.triton.algebra import (
    cell_forward,
    masked,
    masked_backward,
    products,
    products_backward,
    store,
    to_acc,
    zoned,
)
from seqkernels.backends.triton.memory import (
    kernel,
    load_blocks,
    load_mask,
    load_rows,
    load_step,
    load_weights,
    load_x,
    step_of,
    steps_of_tile,
    store_blocks,
)


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
    recurrent, candidate,  # [D, B, H]
    zoneout_h, zoneout_c,  # [N, D, H]
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
    of_factor, of_candidate = load_mask(recurrent, state, here), load_mask(candidate, state, here)
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
        stays_h = load_rows(zoneout_h, at, direction, lane, unit, running, H, D)
        stays_c = load_rows(zoneout_c, at, direction, lane, unit, running, H, D)
        factor = masked(h, of_factor)
        a_0, a_1, a_2, a_3 = products(w_0, w_1, w_2, w_3, factor, b_0, b_1, b_2, b_3, GATES, PRECISION)
        h_t, c_t, s_0, s_1, s_2, s_3 = cell_forward(x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h, c, of_candidate, CELL)
        h_t, c_t = zoned(h, h_t, stays_h), zoned(c, c_t, stays_c)
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
    starts, sizes, y, saved, recurrent, candidate, zoneout_h, zoneout_c,
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
    of_factor, of_candidate = load_mask(recurrent, state, here), load_mask(candidate, state, here)
    w_0, w_1, w_2, w_3 = load_weights(w_hh + direction * GATES * H * H, UNITS, H, GATES, True)

    steps = steps_of_tile(sizes, first, T, RAGGED)
    t = step_of(steps - 1, steps, direction)
    at, running, grad, s_0, s_1, s_2, s_3, now, before = load_step(
        grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
        HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y,
    )  # fmt: skip
    stays_h = load_rows(zoneout_h, at, direction, lane, unit, running, H, D)
    stays_c = load_rows(zoneout_c, at, direction, lane, unit, running, H, D)
    for k in range(steps):
        t = step_of(steps - 2 - k, steps, direction)
        next_at, next_running, next_grad, next_0, next_1, next_2, next_3, next_now, next_before = load_step(
            grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
            HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y,
        )  # fmt: skip
        next_stays_h = load_rows(zoneout_h, next_at, direction, lane, unit, next_running, H, D)
        next_stays_c = load_rows(zoneout_c, next_at, direction, lane, unit, next_running, H, D)
        total = grad_h_t
        if HAS_GRAD_Y:
            total += grad.to(tl.float32)
        s_0, s_1, s_2, s_3, now, before = to_acc(s_0, s_1, s_2, s_3, now, before)
        g_0, g_1, g_2, g_3, past, grad_c_before = masked_backward(
            total, grad_c_t, s_0, s_1, s_2, s_3, now, before, of_candidate, stays_h, stays_c, CELL
        )
        total = past if recurrent is None else tl.zeros_like(past)
        total = products_backward(w_0, w_1, w_2, w_3, g_0, g_1, g_2, g_3, running, total, GATES, PRECISION)
        if recurrent is not None:
            total = past + total * of_factor
        place = grad_gates + (direction * N + at) * GRADS * H
        store_blocks(place, lane * GRADS * H + unit, running, H, g_0, g_1, g_2, g_3, GRADS)
        grad_h_t, grad_c_t = tl.where(running, total, grad_h_t), tl.where(running, grad_c_before, grad_c_t)
        at, running, grad, now, before = next_at, next_running, next_grad, next_now, next_before
        s_0, s_1, s_2, s_3 = next_0, next_1, next_2, next_3
        if zoneout_h is not None:
            stays_h = next_stays_h
        if zoneout_c is not None:
            stays_c = next_stays_c
    store(grad_h + state, grad_h_t, here)
    if HAS_C:
        store(grad_c + state, grad_c_t, here)
