"""Where the numbers of a tile lie, and how the Triton kernels load and store them. Letters as in ``kernels.py``."""

import triton
import triton.language as tl

from seqkernels.backends.triton.algebra import store

# Sizes change from call to call: no kernel is compiled again because one is a multiple of 16, or 1.
kernel = triton.jit(do_not_specialize=["T", "B", "C", "N", "k"])


@triton.jit
def step_of(k, steps, direction):
    """The step that a direction takes as its k-th of `steps`."""
    return tl.where(direction == 0, k, steps - 1 - k)


@triton.jit
def rows_of_step(starts, sizes, t, T, B, RAGGED: tl.constexpr):
    """(first row, number of sequences that run) of step t; 0 run before the first step and after the last."""
    there = (t >= 0) & (t < T)
    if RAGGED:
        start, size = tl.load(starts + t, there, 0), tl.load(sizes + t, there, 0)
    else:
        start, size = t.to(tl.int64) * B, tl.where(there, B, 0).to(tl.int64)
    return start, size


@triton.jit
def states_of_step(pieces, C, starts, sizes, k, direction, first, lane, T, B, RAGGED: tl.constexpr):
    """Of sequences that consist of pieces, which state of ``[D, C, H]`` is that of each one's piece in the k-th step;
    -1 where it does not run."""
    start, size = rows_of_step(starts, sizes, step_of(k, T, direction), T, B, RAGGED)
    running = first + lane < size
    return tl.where(running, direction * C + tl.load(pieces + (start + first) + lane, running, 0), -1)


@triton.jit
def at_border(state, left, piece, begun, next, running, unit, H: tl.constexpr):
    """A state where another piece is next: it leaves as that of its own piece, and becomes that of the next, if there
    is one; of a gradient the next piece is the one before. Elsewhere it stays."""
    leaves = running & (piece >= 0) & (piece != next)
    begins = leaves & (next >= 0)
    store(left + (piece * H + unit), state, leaves)
    return tl.where(begins, tl.load(begun + (next * H + unit), begins, 0.0), state)


@triton.jit
def initial_state(states, state, lane, unit, piece, H: tl.constexpr):
    """Where a sequence's own initial state is, or with pieces that of its piece."""
    if piece is None:
        return states + state + (lane * H + unit)
    else:
        return states + (piece * H + unit)


@triton.jit
def steps_of_tile(sizes, first, T, RAGGED: tl.constexpr):
    """How many steps the longest sequence of a tile has, which is the tile's first."""
    steps = T
    if RAGGED:
        steps = 0
        for at in range(0, T, 128):
            t = at + tl.arange(0, 128)
            steps += tl.sum((tl.load(sizes + t, t < T, 0) > first).to(tl.int32))
    return steps


@triton.jit
def load_blocks(pointer, at, there, H, COUNT: tl.constexpr):
    """Up to four blocks of H; the first one stands in for those that are not there."""
    a = tl.load(pointer + at, there, 0.0)
    b, c, d = a, a, a
    if COUNT > 1:
        b = tl.load(pointer + at + H, there, 0.0)
    if COUNT > 2:
        c = tl.load(pointer + at + 2 * H, there, 0.0)
    if COUNT > 3:
        d = tl.load(pointer + at + 3 * H, there, 0.0)
    return a, b, c, d


@triton.jit
def store_blocks(pointer, at, there, H, a, b, c, d, COUNT: tl.constexpr):
    store(pointer + at, a, there)
    if COUNT > 1:
        store(pointer + at + H, b, there)
    if COUNT > 2:
        store(pointer + at + 2 * H, c, there)
    if COUNT > 3:
        store(pointer + at + 3 * H, d, there)


@triton.jit
def load_weights(w_hh, UNITS: tl.constexpr, H: tl.constexpr, GATES: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The matrices of all gates, each ``[UNITS, UNITS]``, zero beyond H."""
    out, of = tl.arange(0, UNITS)[:, None], tl.arange(0, UNITS)[None, :]
    at = of * H + out if TRANSPOSED else out * H + of
    return load_blocks(w_hh, at, (out < H) & (of < H), H * H, GATES)


@triton.jit
def load_mask(mask, state, there):
    """A mask ``[D, B, H]`` of states; None where there is none."""
    return None if mask is None else tl.load(mask + state, there, 0.0)


@triton.jit
def load_rows(mask, at, direction, lane, unit, running, H: tl.constexpr, D: tl.constexpr):
    """A mask ``[N, D, H]`` of a step; None where there is none."""
    return None if mask is None else tl.load(mask + (at * D + direction) * H + (lane * D * H + unit), running, 0.0)


@triton.jit
def load_x(
    gates_x, starts, sizes, t, direction, first, lane, unit, here, T, B, N,
    H: tl.constexpr, GATES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gates of x ``[D, N, G*H]`` of step t -> (the tile's first row of [N], what runs, the gates)."""
    start, size = rows_of_step(starts, sizes, t, T, B, RAGGED)
    at, running = start + first, here & (first + lane < size)
    gates_x += (direction * N + at) * GATES * H
    x_0, x_1, x_2, x_3 = load_blocks(gates_x, lane * GATES * H + unit, running, H, GATES)
    return at, running, x_0, x_1, x_2, x_3


@triton.jit
def load_step(
    grad_y, y, saved, h_0, c_0, starts, sizes, t, direction, first, lane, unit, here, T, B,
    HAS_C: tl.constexpr, NEEDS_H_PREV: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SAVED: tl.constexpr,
    RAGGED: tl.constexpr, HAS_GRAD_Y: tl.constexpr, piece=None, piece_before=None,
):  # fmt: skip
    """What cell_backward needs of step t -> (the tile's first row of [N], what runs, gradient of y, s_0..s_3, now,
    before)."""
    start, size = rows_of_step(starts, sizes, t, T, B, RAGGED)
    at, running = start + first, here & (first + lane < size)
    place = at * D + direction
    # Before it lies what the previous step left of the sequences that it ran, and the initial state of the others.
    start_before, size_before = rows_of_step(starts, sizes, tl.where(direction == 0, t - 1, t + 1), T, B, RAGGED)
    place_before = (start_before + first) * D + direction
    ran = running & (first + lane < size_before)
    if piece is not None:
        ran = ran & (piece == piece_before)
    state = (direction * B + first) * H
    if NEEDS_H_PREV:
        in_row = lane * D * SAVED * H + unit
        s_0, s_1, s_2, s_3 = load_blocks(saved + place * SAVED * H, in_row, running, H, SAVED)
        before = tl.load(initial_state(h_0, state, lane, unit, piece, H), running & ~ran, 0.0)
        before = tl.where(ran, tl.load(y + place_before * H + (lane * D * H + unit), ran, 0.0), before)
        now = before
    elif HAS_C:
        in_row = lane * D * SAVED * H + unit
        s_0, s_1, s_2, s_3 = load_blocks(saved + place * SAVED * H, in_row, running, H, SAVED - 1)
        now = tl.load(saved + (place * SAVED + SAVED - 1) * H + in_row, running, 0.0)
        before = tl.load(initial_state(c_0, state, lane, unit, piece, H), running & ~ran, 0.0)
        before = tl.where(ran, tl.load(saved + (place_before * SAVED + SAVED - 1) * H + in_row, ran, 0.0), before)
    else:
        # Of an RNN whose h is zoned out, the h before that.
        now = tl.load((saved if SAVED > 0 else y) + place * H + (lane * D * H + unit), running, 0.0)
        s_0, s_1, s_2, s_3, before = now, now, now, now, now
    grad = now
    if HAS_GRAD_Y:
        grad = tl.load(grad_y + place * H + (lane * D * H + unit), running, 0.0)
    return at, running, grad, s_0, s_1, s_2, s_3, now, before
