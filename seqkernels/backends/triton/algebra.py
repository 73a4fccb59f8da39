"""The formulas of the cells, the only copy in Triton, and what steps multiply and round by.

Sources: the torch.nn documentation of RNN, GRU and LSTM, for LiGRU arXiv 1803.10225; the polynomial of tanh is that of
Cephes' tanhf.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---- factors and results in the dtype of the layer


@triton.jit
def from_acc(x, dtype: tl.constexpr):
    """x in another dtype, to the nearest even. Triton's interpreter cuts bfloat16 off, so there we round before it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)


@triton.jit
def product(w, x, PRECISION: tl.constexpr):
    """w x in float32, with x rounded to the dtype of w."""
    x = from_acc(x, w.dtype)
    if INTERPRETED and w.dtype == tl.bfloat16:  # of which the interpreter would multiply the bits
        w, x = w.to(tl.float32), x.to(tl.float32)
    return tl.dot(w, x, input_precision=PRECISION)


@triton.jit
def added(x, y):
    return x if y is None else x + y


@triton.jit
def products(w_0, w_1, w_2, w_3, x, b_0, b_1, b_2, b_3, GATES: tl.constexpr, PRECISION: tl.constexpr):
    """W x + b of all gates, b of each may be None; the first one stands in for those that are not there."""
    a_0 = added(product(w_0, x, PRECISION), b_0)
    a_1, a_2, a_3 = a_0, a_0, a_0
    if GATES > 1:
        a_1 = added(product(w_1, x, PRECISION), b_1)
    if GATES > 2:
        a_2 = added(product(w_2, x, PRECISION), b_2)
    if GATES > 3:
        a_3 = added(product(w_3, x, PRECISION), b_3)
    return a_0, a_1, a_2, a_3


@triton.jit
def products_backward(
    w_0, w_1, w_2, w_3, g_0, g_1, g_2, g_3, running, total, GATES: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """`total`, which may be None, and the gradient of x: the sum of transposed W g of all gates, of what runs."""
    of_first = product(w_0, tl.where(running, g_0, 0.0), PRECISION)
    total = of_first if total is None else total + of_first
    if GATES > 1:
        total += product(w_1, tl.where(running, g_1, 0.0), PRECISION)
    if GATES > 2:
        total += product(w_2, tl.where(running, g_2, 0.0), PRECISION)
    if GATES > 3:
        total += product(w_3, tl.where(running, g_3, 0.0), PRECISION)
    return total


@triton.jit
def store(pointer, x, there):
    tl.store(pointer, from_acc(x, pointer.dtype.element_ty), there)


# ---- the formulas


@triton.jit
def tanh(x):
    """Within 2 ulp of float32: a polynomial where 1 - 2 / (exp(2x) + 1) would cancel."""
    s = x * x
    p = ((((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s) * s
    small = x + x * (p - 3.33332819422e-1 * s)
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN passes


@triton.jit
def masked(x, mask):
    return x if mask is None else x * mask


@triton.jit
def zoned(before, new, stays):
    """A new state, of which `stays` keeps the one before; None: nothing."""
    return new if stays is None else new + stays * (before - new)


@triton.jit
def lstm_c(i, f, g, before, candidate):
    return f * before + i * masked(g, candidate)


@triton.jit
def cell_forward(x_0, x_1, x_2, x_3, h_0, h_1, h_2, h_3, h, c, candidate, CELL: tl.constexpr):
    """One step from its gates -> (h, c, four blocks of `saved`); cells with fewer gates ignore the others. `candidate`
    masks what is added to the state, before its gate; it may be None."""
    if CELL == "gru":
        r, z = tl.sigmoid(x_0 + h_0), tl.sigmoid(x_1 + h_1)
        n = tanh(x_2 + r * h_2)
        new = masked(n, candidate)
        return new + z * (h - new), c, r, z, n, h_2
    elif CELL == "lstm":
        i, f, g, o = tl.sigmoid(x_0 + h_0), tl.sigmoid(x_1 + h_1), tanh(x_2 + h_2), tl.sigmoid(x_3 + h_3)
        c = lstm_c(i, f, g, c, candidate)
        return o * tanh(c), c, i, f, g, o
    elif CELL == "ligru":
        a, z = relu(x_0 + h_0), tl.sigmoid(x_1 + h_1)
        return z * h + (1 - z) * masked(a, candidate), c, a, z, z, z
    elif CELL == "rnn_tanh":
        h = tanh(x_0 + h_0)
        return h, c, h, h, h, h
    else:
        h = relu(x_0 + h_0)
        return h, c, h, h, h, h


@triton.jit
def lstm_backward(grad_h, grad_c, i, f, g, o, tanh_c, before, candidate):
    """What cell_backward gives, from the gradient of c that has that of h in it."""
    grad_i, grad_f = grad_c * masked(g, candidate) * i * (1 - i), grad_c * before * f * (1 - f)
    grad_g, grad_o = masked(grad_c, candidate) * i * (1 - g * g), grad_h * tanh_c * o * (1 - o)
    return grad_i, grad_f, grad_g, grad_o, tl.zeros_like(grad_h), grad_c * f


@triton.jit
def cell_backward(grad_h, grad_c, s_0, s_1, s_2, s_3, now, before, candidate, CELL: tl.constexpr):
    """Gradients of one step -> (four blocks of gates, that of h_prev past the gates, that of c_prev).

    s_0..s_3 are the blocks of `saved`; now and before are the states that the formulas name: GRU and LiGRU h_prev
    (before), LSTM c and c_prev, RNN h (now). GRU's gradients are those of r, z, W_hn h + b_hn and n: the gates of h
    are the first three, those of x all but the third."""
    if CELL == "gru":
        r, z, n, h_n = s_0, s_1, s_2, s_3
        grad_n = masked(grad_h, candidate) * (1 - z) * (1 - n * n)
        grad_r = grad_n * h_n * r * (1 - r)
        grad_z = grad_h * (before - masked(n, candidate)) * z * (1 - z)
        return grad_r, grad_z, grad_n * r, grad_n, grad_h * z, grad_c
    elif CELL == "lstm":
        i, f, g, o = s_0, s_1, s_2, s_3
        tanh_c = tanh(now)
        grad_c += grad_h * o * (1 - tanh_c * tanh_c)
        return lstm_backward(grad_h, grad_c, i, f, g, o, tanh_c, before, candidate)
    elif CELL == "ligru":
        a, z = s_0, s_1
        grad_a = tl.where(a <= 0, 0.0, masked(grad_h, candidate) * (1 - z))
        grad_z = grad_h * (before - masked(a, candidate)) * z * (1 - z)
        return grad_a, grad_z, grad_z, grad_z, grad_h * z, grad_c
    elif CELL == "rnn_tanh":
        grad = grad_h * (1 - now * now)
        return grad, grad, grad, grad, tl.zeros_like(grad_h), grad_c
    else:
        grad = tl.where(now <= 0, 0.0, grad_h)
        return grad, grad, grad, grad, tl.zeros_like(grad_h), grad_c


@triton.jit
def masked_backward(
    grad_h, grad_c, s_0, s_1, s_2, s_3, now, before, candidate, stays_h, stays_c, CELL: tl.constexpr
):  # fmt: skip
    """cell_backward of a step behind which states are zoned; grad_h and grad_c are those of the zoned states."""
    of_h, of_c = grad_h, grad_c
    if stays_h is not None:
        of_h -= grad_h * stays_h
    if stays_c is not None:
        of_c -= grad_c * stays_c
        now = lstm_c(s_0, s_1, s_2, before, candidate)  # that h came from
    g_0, g_1, g_2, g_3, past, of_c = cell_backward(of_h, of_c, s_0, s_1, s_2, s_3, now, before, candidate, CELL)
    if stays_h is not None:
        past += grad_h * stays_h
    if stays_c is not None:
        of_c += grad_c * stays_c
    return g_0, g_1, g_2, g_3, past, of_c


@triton.jit
def to_acc(a, b, c, d, e, f):
    a, b, c = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32)
    return a, b, c, d.to(tl.float32), e.to(tl.float32), f.to(tl.float32)
