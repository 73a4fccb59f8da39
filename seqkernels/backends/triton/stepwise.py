"""The Triton kernels of single steps: the host multiplies, a kernel does the rest of the k-th step of every direction.
Letters, tiles and masks as in ``kernels.py``."""

import triton.language as tl

from seqkernels.backends.triton.algebra import cell_forward, masked_backward, store, to_acc, zoned
from seqkernels.backends.triton.memory import (
    at_border,
    kernel,
    load_blocks,
    load_mask,
    load_rows,
    load_step,
    load_x,
    rows_of_step,
    states_of_step,
    step_of,
    store_blocks,
)


@kernel
def step_forward(
    gates_x,  # [D, N, G*H]
    gates_h,  # [D, B, G*H], the product alone
    b_hh,  # [D, G*H]
    h,  # [D, B, H], changed in place; with a projection what is to be projected
    c,  # [D, B, H] float32, changed in place
    starts, sizes, y, saved, recurrent, candidate, zoneout_h, zoneout_c,
    factors,  # [D, B, H] h of the next product, which is masked; else None
    pieces,  # [N] of sequences that consist of pieces; else None
    h_0, c_0, h_n, c_n,  # [D, C, H] their states
    k, T, B, C, N, CELL: tl.constexpr, HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr,
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
    before, c_before = a_0, a_0
    if NEEDS_H_PREV or zoneout_h is not None:
        before = tl.load(h + state, running, 0.0).to(tl.float32)
    if HAS_C:
        c_before = tl.load(c + state, running, 0.0)
    of_candidate = load_mask(candidate, state, running)
    h_t, c_t, s_0, s_1, s_2, s_3 = cell_forward(
        x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, before, c_before, of_candidate, CELL
    )
    h_t = zoned(before, h_t, load_rows(zoneout_h, at, direction, lane, unit, running, H, D))
    c_t = zoned(c_before, c_t, load_rows(zoneout_c, at, direction, lane, unit, running, H, D))
    place = at * D + direction
    h_next, c_next = h_t, c_t
    if pieces is not None:
        ended = states_of_step(pieces, C, starts, sizes, k, direction, first, lane, T, B, RAGGED)
        next = states_of_step(pieces, C, starts, sizes, k + 1, direction, first, lane, T, B, RAGGED)
        h_next = at_border(h_t, h_n, ended, h_0, next, running, unit, H)
        if HAS_C:
            c_next = at_border(c_t, c_n, ended, c_0, next, running, unit, H)
    store(h + state, h_next, running)
    if recurrent is not None:
        store(factors + state, h_t * tl.load(recurrent + state, running, 0.0), running)
    if not PROJECTED:
        store(y + place * H + (lane * D * H + unit), h_t, running)
    if HAS_C:
        store(c + state, c_next, running)
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
    c_0, starts, sizes, y, saved, recurrent, candidate, zoneout_h, zoneout_c,
    grad_factors,  # [D, B, H] that of h in masked products, which is taken to grad_h, and zero afterwards; else None
    pieces,  # [N] as in step_forward, where h_0 and c_0 are [D, C, H]
    grad_h_n, grad_c_n, grad_h_0, grad_c_0,  # [D, C, H]
    grad_gates,  # [D, N, GRADS*H]
    grad_step,  # [D, B, G*H] gradients of the gates of h; zeros for sequences that do not run
    k, T, B, C, N, CELL: tl.constexpr, HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr, RAGGED: tl.constexpr, GRADS: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr, PROJECTED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(2).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[:, None]
    here = (first + lane < B) & (unit < H)
    piece, piece_before = None, None
    if pieces is not None:
        piece = states_of_step(pieces, C, starts, sizes, k, direction, first, lane, T, B, RAGGED)
        piece_before = states_of_step(pieces, C, starts, sizes, k - 1, direction, first, lane, T, B, RAGGED)
    at, running, grad, s_0, s_1, s_2, s_3, now, before = load_step(
        grad_y, y, saved, h_0, c_0, starts, sizes, step_of(k, T, direction), direction, first, lane, unit, here, T, B,
        HAS_C, NEEDS_H_PREV, H, D, SAVED, RAGGED, HAS_GRAD_Y, piece, piece_before,
    )  # fmt: skip
    of_state = direction * B + first
    state = of_state * H + (lane * H + unit)
    total = tl.load(grad_h + state, running, 0.0).to(tl.float32)
    if recurrent is not None:
        of_factor = tl.load(recurrent + state, running, 0.0)
        total += of_factor * tl.load(grad_factors + state, running, 0.0).to(tl.float32)
        store(grad_factors + state, tl.zeros_like(total), running)
    if pieces is not None:
        later = states_of_step(pieces, C, starts, sizes, k + 1, direction, first, lane, T, B, RAGGED)
        total = at_border(total, grad_h_0, later, grad_h_n, piece, running, unit, H)
    if HAS_GRAD_Y:
        total += grad.to(tl.float32)
    grad_c_t = total
    if HAS_C:
        grad_c_t = tl.load(grad_c + state, running, 0.0)
        if pieces is not None:
            grad_c_t = at_border(grad_c_t, grad_c_0, later, grad_c_n, piece, running, unit, H)
    s_0, s_1, s_2, s_3, now, before = to_acc(s_0, s_1, s_2, s_3, now, before)
    of_candidate = load_mask(candidate, state, running)
    stays_h = load_rows(zoneout_h, at, direction, lane, unit, running, H, D)
    stays_c = load_rows(zoneout_c, at, direction, lane, unit, running, H, D)
    g_0, g_1, g_2, g_3, total, grad_c_t = masked_backward(
        total, grad_c_t, s_0, s_1, s_2, s_3, now, before, of_candidate, stays_h, stays_c, CELL
    )
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
