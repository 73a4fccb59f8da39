"""The Triton kernels of layers with layer norm (``seqkernels.layer_norm_ops``): what a step computes, and those of
single steps, of which a program does what comes behind the product. All units of a sequence are in one program, so that
norms need nobody else.

Letters, tiles and masks as in ``kernels.py``, but UNITS is at least H, and SAVED counts the blocks that these leave;
everything is float32. shift, scale_c and shift_c are None where there are none.
"""

import triton
import triton.language as tl

from seqkernels.backends.torch_steps import EPS
from seqkernels.backends.triton.algebra import cell_backward, cell_forward, lstm_backward, tanh, zoned
from seqkernels.backends.triton.memory import (
    kernel,
    load_blocks,
    load_mask,
    load_rows,
    load_step,
    rows_of_step,
    step_of,
    store_blocks,
)

_EPS = tl.constexpr(EPS)


# ---- the algebra of one step


@triton.jit
def mean_of(x_0, x_1, x_2, x_3, H: tl.constexpr, GATES: tl.constexpr):
    """Over all units and gates, for each sequence ``[1, ROWS]``; beyond H there are zeros."""
    if GATES > 1:
        x_0 += x_1
    if GATES > 2:
        x_0 += x_2
    if GATES > 3:
        x_0 += x_3
    return tl.sum(x_0, 0, keep_dims=True) / (GATES * H)


@triton.jit
def normalized(x_0, x_1, x_2, x_3, there, H: tl.constexpr, GATES: tl.constexpr):
    """-> (x - mean) / sqrt(variance + EPS) of all gates together, that mean, and the inverse of the root."""
    mean = mean_of(x_0, x_1, x_2, x_3, H, GATES)
    x_0, x_1 = tl.where(there, x_0 - mean, 0.0), tl.where(there, x_1 - mean, 0.0)
    x_2, x_3 = tl.where(there, x_2 - mean, 0.0), tl.where(there, x_3 - mean, 0.0)
    inverse = 1 / tl.sqrt(mean_of(x_0 * x_0, x_1 * x_1, x_2 * x_2, x_3 * x_3, H, GATES) + _EPS)
    return x_0 * inverse, x_1 * inverse, x_2 * inverse, x_3 * inverse, mean, inverse


@triton.jit
def normalized_backward(g_0, g_1, g_2, g_3, n_0, n_1, n_2, n_3, inverse, H: tl.constexpr, GATES: tl.constexpr):
    """The gradients of x, from those of what `normalized` gives of it, n."""
    mean = mean_of(g_0, g_1, g_2, g_3, H, GATES)
    along = mean_of(g_0 * n_0, g_1 * n_1, g_2 * n_2, g_3 * n_3, H, GATES)
    x_0, x_1 = inverse * (g_0 - mean - n_0 * along), inverse * (g_1 - mean - n_1 * along)
    return x_0, x_1, inverse * (g_2 - mean - n_2 * along), inverse * (g_3 - mean - n_3 * along)


@triton.jit
def scaled(n_0, n_1, n_2, n_3, scale, shift, unit, H: tl.constexpr, GATES: tl.constexpr):
    """What was normalized times its scale, and shifted, by the parameters of a direction."""
    w_0, w_1, w_2, w_3 = load_blocks(scale, unit, unit < H, H, GATES)
    n_0, n_1, n_2, n_3 = n_0 * w_0, n_1 * w_1, n_2 * w_2, n_3 * w_3
    if shift is not None:
        b_0, b_1, b_2, b_3 = load_blocks(shift, unit, unit < H, H, GATES)
        n_0, n_1, n_2, n_3 = n_0 + b_0, n_1 + b_1, n_2 + b_2, n_3 + b_3
    return n_0, n_1, n_2, n_3


@triton.jit
def norm_forward(
    x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h, c, scale, shift, scale_c, shift_c, candidate, unit,
    CELL: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, OF_SUM: tl.constexpr,
):  # fmt: skip
    """One step from the gates of x and the products a -> (h, c, four blocks of what is normalized, its inverse, mean
    and inverse of c)."""
    if OF_SUM:
        a_0, a_1, a_2, a_3 = a_0 + x_0, a_1 + x_1, a_2 + x_2, a_3 + x_3
        x_0, x_1, x_2, x_3 = 0.0, 0.0, 0.0, 0.0
    n_0, n_1, n_2, n_3, _, inverse = normalized(a_0, a_1, a_2, a_3, unit < H, H, GATES)
    a_0, a_1, a_2, a_3 = scaled(n_0, n_1, n_2, n_3, scale, shift, unit, H, GATES)
    h_t, c_t, _, _, _, o = cell_forward(x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, h, c, candidate, CELL)
    mean_c, inverse_c = inverse, inverse
    if scale_c is not None:
        m, _, _, _, mean_c, inverse_c = normalized(c_t, c_t, c_t, c_t, unit < H, H, 1)
        m, _, _, _ = scaled(m, m, m, m, scale_c, shift_c, unit, H, 1)
        h_t = o * tanh(m)
    return h_t, c_t, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c


@triton.jit
def norm_backward(
    grad_h, grad_c, x_0, x_1, x_2, x_3, n_0, n_1, n_2, n_3, before, scale, shift, scale_c, shift_c,
    inverse, mean_c, inverse_c, candidate, stays_h, stays_c, unit,
    CELL: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, OF_SUM: tl.constexpr,
):  # fmt: skip
    """Gradients of one step -> (those of cell_backward, of what was normalized, of c's norm; and that norm)."""
    a_0, a_1, a_2, a_3 = scaled(n_0, n_1, n_2, n_3, scale, shift, unit, H, GATES)
    if OF_SUM:
        x_0, x_1, x_2, x_3 = 0.0, 0.0, 0.0, 0.0
    h_t, now, s_0, s_1, s_2, s_3 = cell_forward(x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, before, before, candidate, CELL)
    if GATES == 1:
        now = h_t
    of_h, of_c = grad_h, grad_c
    if stays_h is not None:
        of_h -= grad_h * stays_h
    if stays_c is not None:
        of_c -= grad_c * stays_c
    grad_m, m = of_h, now
    if scale_c is not None:
        m = tl.where(unit < H, (now - mean_c) * inverse_c, 0.0)
        tanh_c, _, _, _ = scaled(m, m, m, m, scale_c, shift_c, unit, H, 1)
        tanh_c = tanh(tanh_c)
        grad_m = of_h * s_3 * (1 - tanh_c * tanh_c)
        grad = grad_m * tl.load(scale_c + unit, unit < H, 0.0)
        grad, _, _, _ = normalized_backward(grad, grad, grad, grad, m, m, m, m, inverse_c, H, 1)
        g_0, g_1, g_2, g_3, past, of_c = lstm_backward(of_h, of_c + grad, s_0, s_1, s_2, s_3, tanh_c, before, candidate)
    else:
        g_0, g_1, g_2, g_3, past, of_c = cell_backward(of_h, of_c, s_0, s_1, s_2, s_3, now, before, candidate, CELL)
    if stays_h is not None:
        past += grad_h * stays_h
    if stays_c is not None:
        of_c += grad_c * stays_c
    w_0, w_1, w_2, w_3 = load_blocks(scale, unit, unit < H, H, GATES)
    d_0, d_1, d_2, d_3 = normalized_backward(
        g_0 * w_0, g_1 * w_1, g_2 * w_2, g_3 * w_3, n_0, n_1, n_2, n_3, inverse, H, GATES
    )
    return g_0, g_1, g_2, g_3, past, of_c, d_0, d_1, d_2, d_3, grad_m, m


# ---- loads and stores of one step


@triton.jit
def of_direction(parameters, direction, size):
    return None if parameters is None else parameters + direction * size


@triton.jit
def load_sums(
    gates_x, starts, sizes, t, direction, first, lane, unit, T, B,
    H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gates of x ``[N, D, G*H]`` of step t -> (the tile's first row of [N], which sequences run, the gates)."""
    start, size = rows_of_step(starts, sizes, t, T, B, RAGGED)
    at, runs = start + first, first + lane < size
    gates_x += (at * D + direction) * GATES * H
    x_0, x_1, x_2, x_3 = load_blocks(gates_x, lane * D * GATES * H + unit, runs & (unit < H), H, GATES)
    return at, runs, x_0, x_1, x_2, x_3


@triton.jit
def store_step(
    y, saved, statistics, at, direction, lane, unit, runs, h, c, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c,
    HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr, SAVED: tl.constexpr,
    STATISTICS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Write y ``[N, D*H]``, saved ``[N, D, SAVED*H]`` and statistics ``[N, D, STATISTICS]`` of a step."""
    place, running = at * D + direction, runs & (unit < H)
    tl.store(y + place * H + (lane * D * H + unit), h, running)
    if SAVE:
        in_row = lane * D * SAVED * H + unit
        store_blocks(saved + place * SAVED * H, in_row, running, H, n_0, n_1, n_2, n_3, GATES)
        if HAS_C:
            tl.store(saved + (place * SAVED + GATES) * H + in_row, c, running)
        of_row = statistics + place * STATISTICS + lane * D * STATISTICS
        tl.store(of_row, inverse, runs)
        if STATISTICS > 1:
            tl.store(of_row + 1, mean_c, runs)
            tl.store(of_row + 2, inverse_c, runs)


@triton.jit
def store_gradients(
    grad_normed, grad_sums, grad_last, of_norm_c, place, lane, unit, running,
    g_0, g_1, g_2, g_3, d_0, d_1, d_2, d_3, grad_m, m, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Write the results of a step's norm_backward, by rows."""
    in_row = lane * D * GATES * H + unit
    store_blocks(grad_normed + place * GATES * H, in_row, running, H, g_0, g_1, g_2, g_3, GATES)
    store_blocks(grad_sums + place * GATES * H, in_row, running, H, d_0, d_1, d_2, d_3, GATES)
    if grad_last is not None:
        tl.store(grad_last + place * H + (lane * D * H + unit), g_3, running)
    if of_norm_c is not None:
        of_c = of_norm_c + place * 2 * H + (lane * D * 2 * H + unit)
        tl.store(of_c, grad_m * m, running)
        tl.store(of_c + H, grad_m, running)


# ---- stepwise


@kernel
def norm_step_forward(
    gates_x,  # [N, D, G*H]
    gates_h,  # [D, B, G*H], the product alone
    scale, shift,  # [D, G*H]
    scale_c, shift_c,  # [D, H]
    h, c,  # [D, B, H], changed in place
    factors,  # [D, B, H] h of the next product; None where no mask makes it another than h
    starts, sizes, y, saved, statistics, recurrent, candidate, zoneout_h, zoneout_c, k, T, B, N,
    CELL: tl.constexpr, HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
    SAVED: tl.constexpr, STATISTICS: tl.constexpr, RAGGED: tl.constexpr, OF_SUM: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    at, runs, x_0, x_1, x_2, x_3 = load_sums(
        gates_x, starts, sizes, step_of(k, T, direction), direction, first, lane, unit, T, B, H, D, GATES, RAGGED
    )
    running, of_state = runs & (unit < H), direction * B + first
    state = of_state * H + (lane * H + unit)
    a_0, a_1, a_2, a_3 = load_blocks(gates_h + of_state * GATES * H, lane * GATES * H + unit, running, H, GATES)
    before = tl.load(h + state, running, 0.0)
    c_before = before
    if HAS_C:
        c_before = tl.load(c + state, running, 0.0)
    h_t, c_t, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c = norm_forward(
        x_0, x_1, x_2, x_3, a_0, a_1, a_2, a_3, before, c_before, of_direction(scale, direction, GATES * H),
        of_direction(shift, direction, GATES * H), of_direction(scale_c, direction, H),
        of_direction(shift_c, direction, H), load_mask(candidate, state, running), unit, CELL, H, GATES, OF_SUM,
    )  # fmt: skip
    h_t = zoned(before, h_t, load_rows(zoneout_h, at, direction, lane, unit, running, H, D))
    c_t = zoned(c_before, c_t, load_rows(zoneout_c, at, direction, lane, unit, running, H, D))
    tl.store(h + state, h_t, running)
    if HAS_C:
        tl.store(c + state, c_t, running)
    if recurrent is not None:
        tl.store(factors + state, h_t * tl.load(recurrent + state, running, 0.0), running)
    store_step(
        y, saved, statistics, at, direction, lane, unit, runs, h_t, c_t, n_0, n_1, n_2, n_3, inverse, mean_c, inverse_c,
        HAS_C, H, D, GATES, SAVED, STATISTICS, SAVE,
    )  # fmt: skip


@kernel
def norm_step_backward(
    grad_y,  # [N, D*H]
    grad_h, grad_c,  # [D, B, H], changed in place
    grad_factors,  # [D, B, H] that of h in masked products, which is taken to grad_h, and zero afterwards; else None
    gates_x, scale, shift, scale_c, shift_c, h_0, c_0, starts, sizes, y, saved, statistics,
    recurrent, candidate, zoneout_h, zoneout_c,
    grad_normed, grad_sums,  # [N, D, G*H] of what was scaled and shifted, and of what was normalized
    grad_last,  # [N, D, H] of the gate of x that stays apart; None where there is none
    of_norm_c,  # [N, D, 2*H]: of scale_c and shift_c of each row; None where there is no such
    grad_step,  # [D, B, G*H] grad_sums of the sequences that run, zeros of the others
    k, T, B, N, CELL: tl.constexpr, HAS_C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, GATES: tl.constexpr,
    SAVED: tl.constexpr, STATISTICS: tl.constexpr, RAGGED: tl.constexpr, OF_SUM: tl.constexpr,
    HAS_GRAD_Y: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    first, direction = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64)
    lane, unit = tl.arange(0, ROWS)[None, :], tl.arange(0, UNITS)[:, None]
    here, t = (first + lane < B) & (unit < H), step_of(k, T, direction)
    at, running, grad, n_0, n_1, n_2, n_3, _, before = load_step(
        grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
        HAS_C, not HAS_C, H, D, SAVED, RAGGED, HAS_GRAD_Y,
    )  # fmt: skip
    _, runs, x_0, x_1, x_2, x_3 = load_sums(
        gates_x, starts, sizes, t, direction, first, lane, unit, T, B, H, D, GATES, RAGGED
    )
    place, of_state = at * D + direction, direction * B + first
    state = of_state * H + (lane * H + unit)
    total = tl.load(grad_h + state, running, 0.0)
    if recurrent is not None:
        total += tl.load(recurrent + state, running, 0.0) * tl.load(grad_factors + state, running, 0.0)
        tl.store(grad_factors + state, tl.zeros_like(total), running)
    if HAS_GRAD_Y:
        total += grad
    grad_c_t = total
    if HAS_C:
        grad_c_t = tl.load(grad_c + state, running, 0.0)
    of_row = statistics + place * STATISTICS + lane * D * STATISTICS
    inverse, mean_c, inverse_c, _ = load_blocks(of_row, 0, runs, 1, STATISTICS)
    g_0, g_1, g_2, g_3, past, grad_c_t, d_0, d_1, d_2, d_3, grad_m, m = norm_backward(
        total, grad_c_t, x_0, x_1, x_2, x_3, n_0, n_1, n_2, n_3, before, of_direction(scale, direction, GATES * H),
        of_direction(shift, direction, GATES * H), of_direction(scale_c, direction, H),
        of_direction(shift_c, direction, H), inverse, mean_c, inverse_c, load_mask(candidate, state, running),
        load_rows(zoneout_h, at, direction, lane, unit, running, H, D),
        load_rows(zoneout_c, at, direction, lane, unit, running, H, D), unit, CELL, H, GATES, OF_SUM,
    )  # fmt: skip
    store_gradients(
        grad_normed, grad_sums, grad_last, of_norm_c, place, lane, unit, running,
        g_0, g_1, g_2, g_3, d_0, d_1, d_2, d_3, grad_m, m, H, D, GATES,
    )  # fmt: skip
    d_0, d_1 = tl.where(running, d_0, 0.0), tl.where(running, d_1, 0.0)
    d_2, d_3 = tl.where(running, d_2, 0.0), tl.where(running, d_3, 0.0)
    store_blocks(grad_step + of_state * GATES * H, lane * GATES * H + unit, here, H, d_0, d_1, d_2, d_3, GATES)
    tl.store(grad_h + state, past, running)
    if HAS_C:
        tl.store(grad_c + state, grad_c_t, running)
