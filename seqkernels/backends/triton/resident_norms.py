"""The resident Triton kernels of layers with layer norm: a program walks all steps of its tile with the recurrent
weights on chip. Arguments as in ``norms.py``, which has what a step computes."""

import triton.language as tl

from seqkernels.backends.triton.algebra import masked, products, products_backward, zoned
from seqkernels.backends.triton.memory import (
    kernel,
    load_blocks,
    load_mask,
    load_rows,
    load_step,
    load_weights,
    step_of,
    steps_of_tile,
)
from seqkernels.backends.triton.norms import (
    load_sums,
    norm_backward,
    norm_forward,
    of_direction,
    store_gradients,
    store_step,
)


@kernel
def norm_resident_forward(
    gates_x,  # [N, D, G*H]
    w_hh,  # [D, G*H, H]
    scale, shift, scale_c, shift_c,
    h_n, c_n,  # [D, B, H], at first h_0 and c_0
    starts, sizes, y, saved, statistics, recurrent, candidate, zoneout_h, zoneout_c, T, B, N,
    CELL: tl.constexpr, HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
    SAVED: tl.constexpr, STATISTICS: tl.constexpr, RAGGED: tl.constexpr, OF_SUM: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    here = (first + lane < B) & (unit < H)
    state = (direction * B + first) * H + (lane * H + unit)
    h = tl.load(h_n + state, here, 0.0)
    c = tl.zeros([UNITS, ROWS], tl.float32)
    if HAS_C:
        c = tl.load(c_n + state, here, 0.0)
    of_factor, of_candidate = load_mask(recurrent, state, here), load_mask(candidate, state, here)
    scale, shift = of_direction(scale, direction, GATES * H), of_direction(shift, direction, GATES * H)
    scale_c, shift_c = of_direction(scale_c, direction, H), of_direction(shift_c, direction, H)
    w_0, w_1, w_2, w_3 = load_weights(w_hh + direction * GATES * H * H, UNITS, H, GATES, False)

    steps = steps_of_tile(sizes, first, T, RAGGED)
    at, runs, x_0, x_1, x_2, x_3 = load_sums(
        gates_x, starts, sizes, step_of(0, steps, direction), direction, first, lane, unit, T, B, H, D, GATES, RAGGED
    )
    for k in range(steps):
        # One step ahead, so that reading overlaps with the products.
        t = step_of(k + 1, steps, direction)
        next_at, next_runs, next_0, next_1, next_2, next_3 = load_sums(
            gates_x, starts, sizes, t, direction, first, lane, unit, T, B, H, D, GATES, RAGGED
        )
        running = runs & (unit < H)
        stays_h = load_rows(zoneout_h, at, direction, lane, unit, running, H, D)
        stays_c = load_rows(zoneout_c, at, direction, lane, unit, running, H, D)
        factor = masked(h, of_factor)
        a_0, a_1, a_2, a_3 = products(w_0, w_1, w_2, w_3, factor, None, None, None, None, GATES, PRECISION)
        h_t, c_t, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c = norm_forward(
            x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h, c, scale, shift, scale_c, shift_c, of_candidate, unit,
            CELL, H, GATES, OF_SUM,
        )  # fmt: skip
        # Sequences that have ended, or (backwards in time) not yet begun, keep their state.
        h = tl.where(running, zoned(h, h_t, stays_h), h)
        c = tl.where(running, zoned(c, c_t, stays_c), c)
        store_step(
            y, saved, statistics, at, direction, lane, unit, runs, h, c, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c,
            HAS_C, H, D, GATES, SAVED, STATISTICS, SAVE,
        )  # fmt: skip
        at, runs, x_0, x_1, x_2, x_3 = next_at, next_runs, next_0, next_1, next_2, next_3
    tl.store(h_n + state, h, here)
    if HAS_C:
        tl.store(c_n + state, c, here)


@kernel
def norm_resident_backward(
    grad_y, grad_h, grad_c,  # [D, B, H]: of h_n and c_n, and then of h_0 and c_0
    gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, starts, sizes, y, saved, statistics,
    recurrent, candidate, zoneout_h, zoneout_c, grad_normed, grad_sums, grad_last, of_norm_c, T, B, N,
    CELL: tl.constexpr, HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
    SAVED: tl.constexpr, STATISTICS: tl.constexpr, RAGGED: tl.constexpr, OF_SUM: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    here = (first + lane < B) & (unit < H)
    state = (direction * B + first) * H + (lane * H + unit)
    grad_h_t = tl.load(grad_h + state, here, 0.0)
    grad_c_t = tl.zeros([UNITS, ROWS], tl.float32)
    if HAS_C:
        grad_c_t = tl.load(grad_c + state, here, 0.0)
    scale, shift = of_direction(scale, direction, GATES * H), of_direction(shift, direction, GATES * H)
    scale_c, shift_c = of_direction(scale_c, direction, H), of_direction(shift_c, direction, H)
    w_0, w_1, w_2, w_3 = load_weights(w_hh + direction * GATES * H * H, UNITS, H, GATES, True)

    steps = steps_of_tile(sizes, first, T, RAGGED)
    for k in range(steps):
        t = step_of(steps - 1 - k, steps, direction)
        at, running, grad, n_0, n_1, n_2, n_3, _, before = load_step(
            grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
            HAS_C, not HAS_C, H, D, SAVED, RAGGED, HAS_GRAD_Y,
        )  # fmt: skip
        _, runs, x_0, x_1, x_2, x_3 = load_sums(
            gates_x, starts, sizes, t, direction, first, lane, unit, T, B, H, D, GATES, RAGGED
        )
        place = at * D + direction
        of_row = statistics + place * STATISTICS + lane * D * STATISTICS
        inverse, mean_c, inverse_c, _ = load_blocks(of_row, 0, runs, 1, STATISTICS)
        total = grad_h_t
        if HAS_GRAD_Y:
            total += grad
        g_0, g_1, g_2, g_3, past, grad_c_before, d_0, d_1, d_2, d_3, grad_m, m = norm_backward(
            total, grad_c_t, x_0, x_1, x_2, x_3, n_0, n_1, n_2, n_3, before, scale, shift, scale_c, shift_c,
            inverse, mean_c, inverse_c, load_mask(candidate, state, here),
            load_rows(zoneout_h, at, direction, lane, unit, running, H, D),
            load_rows(zoneout_c, at, direction, lane, unit, running, H, D), unit, CELL, H, GATES, OF_SUM,
        )  # fmt: skip
        store_gradients(
            grad_normed, grad_sums, grad_last, of_norm_c, place, lane, unit, running,
            g_0, g_1, g_2, g_3, d_0, d_1, d_2, d_3, grad_m, m, H, D, GATES,
        )  # fmt: skip
        of_factor = products_backward(w_0, w_1, w_2, w_3, d_0, d_1, d_2, d_3, running, None, GATES, PRECISION)
        total = past + masked(of_factor, load_mask(recurrent, state, here))
        grad_h_t, grad_c_t = tl.where(running, total, grad_h_t), tl.where(running, grad_c_before, grad_c_t)
    tl.store(grad_h + state, grad_h_t, here)
    if HAS_C:
        tl.store(grad_c + state, grad_c_t, here)
