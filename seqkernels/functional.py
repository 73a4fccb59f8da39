"""RNN, GRU, LSTM and LiGRU as functions: layers, directions and dropout around the operator pair.

Results, argument checks and their messages are those of torch.nn's modules
(https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html and its siblings).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, modes, onnx_export, ops, select
from seqkernels.backends import stack
from seqkernels.checks import State
from seqkernels.inputs import Inputs, call_of_step, prepare


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """GRU over whole sequences.

    Args:
        input: ``[T, B, I]``, with batch_first ``[B, T, I]``, unbatched ``[T, I]``, or a PackedSequence; with
            cu_seqlens ``[N, I]``. float64, float32, bfloat16 or float16.
        hx: initial state ``[L*D, B, H]`` (unbatched ``[L*D, H]``), None for zeros.
        weights: for each layer, for each direction: w_ih, w_hh, then with bias b_ih, b_hh; torch.nn's shapes and order.
        bias, num_layers, dropout, training, bidirectional, batch_first: as in torch.nn.GRU.
        lengths: ``[B]`` integers on any device, in any order, zeros allowed: what lies behind a sequence's end is
            not read, and is zero in the output; h_n is the state at each sequence's end.
        cu_seqlens: ``[B + 1]`` integers: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of the input.
        max_seqlen: bound of the lengths in cu_seqlens; spares reading it from the device, and torch.compile needs it.
        recompute: True saves the input of each layer alone for the backward pass, which runs the layer again: the same
            bits in less memory and more time (docs/memory.md).
        backend: force one of `seqkernels.select.BACKENDS`.

    Returns:
        output in the layout of the input, with D*H features, and h_n ``[L*D, B, H]``.

    Raises:
        ValueError, RuntimeError, TypeError: torch.nn's own for what does not fit; ValueError for lengths or cu_seqlens
            that do not fit, and where no backend can run the call; TypeError for a recompute that is no bool.
    """
    checks.check_kind(weights)
    return recurrent(
        "gru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, recompute=recompute, backend=backend,
    )  # fmt: skip


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN over whole sequences; arguments as `gru`, and nonlinearity "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    checks.check_kind(weights)
    return recurrent(
        "rnn_" + nonlinearity, input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout,
        training=training, bidirectional=bidirectional, batch_first=batch_first, lengths=lengths,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, recompute=recompute, backend=backend,
    )  # fmt: skip


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """LSTM over whole sequences; arguments as `gru`, with hx = (h_0, c_0) and (h_n, c_n) returned.

    weights may hold a projection w_hr ``[P, H]`` behind each direction's others: then h has P features.
    """
    checks.check_kind(weights)
    return recurrent(
        "lstm", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, recompute=recompute, backend=backend,
    )  # fmt: skip


def ligru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Light GRU over whole sequences (formula at `seqkernels.LiGRU`); arguments as `gru`, with w_ih ``[2*H, I]``."""
    checks.check_kind(weights)
    return recurrent(
        "ligru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, recompute=recompute, backend=backend,
    )  # fmt: skip


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    recompute: bool = False,
    backend: str | None = None,
):
    """What the functions above and the modules have in common; `cell`: of `seqkernels.backends.cells.CELLS`."""
    directions = 2 if bidirectional else 1
    checks.check_recompute(recompute)
    checks.count_weights(len(weights), num_layers * directions, bias, cell)
    if onnx_export.exporting():
        dropout = dropout if training else 0.0
        options = num_layers, directions, dropout, batch_first, lengths, cu_seqlens
        return onnx_export.recurrent(cell, input, hx, weights, *options)
    inputs = prepare(cell, input, hx, weights, num_layers, directions, batch_first, lengths, cu_seqlens, max_seqlen)
    plan = select.plan_of(inputs.call, inputs.rows.data.device, backend)
    y, h_n, c_n = run(plan, inputs, weights, dropout if training else 0.0, recompute)
    h_n = restore(h_n, inputs)
    return inputs.rows.restore_layout(y), (h_n if inputs.c_0 is None else (h_n, restore(c_n, inputs)))


def run(
    plan: select.Plan, inputs: Inputs, weights: Sequence[Tensor], dropout: float, recompute: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, with dropout between them -> y, h_n, c_n."""
    (y, batch_sizes, *_), h_0, c_0, _, call = inputs
    layers, wanted = call.layers, modes.wants_gradients(y, h_0, c_0, *weights)
    # One call of the operator, which knows no dropout; nor layers that are frozen below others, whose gradients it
    # would compute, nor to run again one layer at a time. (cuDNN cannot leave any out.)
    together = plan.backend == "cudnn" or (not (wanted and recompute) and _want_alike(weights, len(weights) // layers))
    if layers == 1 or (dropout == 0 and together):
        return ops.recurrence_forward(plan, call, y, weights, h_0, c_0, batch_sizes, wanted, recompute)
    of_one, h_n, c_n = call._replace(layers=1), [], []
    for layer, (of_layer, begin_h, begin_c) in enumerate(stack.each(layers, weights, h_0, c_0)):
        if layer and dropout > 0:
            y = F.dropout(y, dropout, True)
        wanted = modes.wants_gradients(y, begin_h, begin_c, *of_layer)
        y, h, c = ops.recurrence_forward(plan, of_one, y, of_layer, begin_h, begin_c, batch_sizes, wanted, recompute)
        h_n.append(h)
        c_n.append(c)
    return y, torch.cat(h_n), torch.cat(c_n)


def _want_alike(weights: Sequence[Tensor], each: int) -> bool:
    """Whether the weights of all layers want gradients, or those of none."""
    wants = [modes.wants_gradients(*weights[k : k + each]) for k in range(0, len(weights), each)]
    return all(wants) or not any(wants)


def recurrent_cell(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None = None,
    *,
    weights: Sequence[Tensor],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step: input ``[B, I]``, states ``[B, H]``, weights w_ih, w_hh, (b_ih, b_hh) -> (h, c); c: LSTM only.

    Raises:
        RuntimeError: torch.nn's own for sizes, dtypes and devices that do not fit.
    """
    checks.check_kind(weights)
    checks.check_step(input, (h_0,) if c_0 is None else (h_0, c_0), weights)
    if onnx_export.exporting():
        return onnx_export.step(cell, input, h_0, c_0, weights)
    call = call_of_step(cell, input, weights, h_0, c_0)
    plan = select.plan_of(call, input.device, backend)
    # With a single step y is h.
    states = h_0.unsqueeze(0), None if c_0 is None else c_0.unsqueeze(0)
    wanted = modes.wants_gradients(input, h_0, c_0, *weights)
    y, _, c = ops.recurrence_forward(plan, call, input, weights, *states, None, wanted)
    return y, c if c_0 is None else c.squeeze(0)


def restore(state: Tensor, inputs: Inputs) -> Tensor:
    """A final state ``[L*D, B, *]`` in the user's order of sequences."""
    unsorted_indices = inputs.rows.unsorted_indices
    if unsorted_indices is not None:
        state = state.index_select(1, unsorted_indices)
    return state.squeeze(1) if inputs.unbatched else state
