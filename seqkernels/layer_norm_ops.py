"""The operator pair of one layer with layer norm (docs/cells.md), beside any masks: the sweep over its steps.

What comes of the input is computed before it, for all rows at once, in torch operations (`forward`).

``layer_norm_forward.<backend>``, everything in float32 or float64
    gates_x ``[N, D, G*H]``: W_ih x where its sum with W_hh h is normalized (of_sum), else N(W_ih x; scale_ih) + b_ih
    w_hh ``[D, G*H, H]``
    scale, shift ``[D, G*H]``: of the norm of W_hh h or, of_sum, of the sum; shift is None without bias
    scale_c, shift_c ``[D, H]``: of the norm of an LSTM's c where h is read from it; None where there is no such
    h_0 ``[D, B, H]``, c_0 ``[D, B, H]`` (LSTM), batch_sizes: as of ``recurrence_forward``
    recurrent, candidate ``[D, B, H]``, zoneout_h, zoneout_c ``[N, D, H]``: `seqkernels.cell_options.Masks`
    launch: as of ``recurrence_forward``
    -> y ``[N, D*H]``, h_n ``[D, B, H]``, c_n ``[D, B, H]`` (else ``[D, B, 0]``), saved, statistics

saved ``[N, D, (G+S-1)*H]``: the products (of_sum: the sums) normalized, before their scale, and behind them the c of an
LSTM that is carried. statistics ``[N, D, 1]``: the 1 / sqrt(variance + 1e-5) that they were normalized by; with scale_c
``[N, D, 3]``, behind it the mean of c and c's 1 / sqrt(variance + 1e-5). c is normalized before zoneout. Gates are no
part of it: a backward pass has them of gates_x and what is saved. With ``save=False`` both are ``[N, D, 0]``.

``layer_norm_backward.<backend>``
    -> gradients of gates_x, w_hh, scale, shift, scale_c, shift_c, h_0 and c_0; empty ones, ``[0]``, of what is None,
    and with ``wants_w_hh=False`` of w_hh.

Masks have no gradients. A projection and blocks are none of this operator's.
"""

_OF_LAYER = (
    "Tensor gates_x, Tensor w_hh, Tensor scale, Tensor? shift, Tensor? scale_c, Tensor? shift_c, Tensor h_0, "
    "Tensor? c_0, Tensor? batch_sizes, Tensor? recurrent, Tensor? candidate, Tensor? zoneout_h, Tensor? zoneout_c, "
    "bool of_sum"
)
FORWARD_SCHEMA = (
    f"(str cell, {_OF_LAYER}, bool save, int[] launch) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved, Tensor statistics)"
)
BACKWARD_SCHEMA = (
    f"(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, {_OF_LAYER}, Tensor y, Tensor saved, "
    "Tensor statistics, bool wants_w_hh, int[] launch) "
    "-> (Tensor grad_gates_x, Tensor grad_w_hh, Tensor grad_scale, Tensor grad_shift, Tensor grad_scale_c, "
    "Tensor grad_shift_c, Tensor grad_h_0, Tensor grad_c_0)"
)
