"""RNN, GRU, LSTM and LiGRU as functions: layers, directions and dropout around the operator pair.

Results, argument checks and their messages are those of torch.nn's modules
(https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html and its siblings).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, ensembles, kept_weights, modes, onnx_export, ops, select, with_options
from seqkernels.backends import stack
from seqkernels.cell_options import CellOptions
from seqkernels.checks import State
from seqkernels.inputs import Inputs, facts_of_step, prepare, restore_layout

if TYPE_CHECKING:
    from seqkernels.modules import _Recurrent


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
    reset: Tensor | PackedSequence | None = None,
    reset_to: Tensor | None = None,
    recompute: bool = False,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
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
        reset: mask of torch.bool on the CPU or where the input is, of the input's shape without its features (of a
            PackedSequence one as well, or the rows of its data; of cu_seqlens ``[N]``): the state before a marked step
            is reset_to, so that sequences are cut there and each piece runs alone. h_n is that of the last pieces.
            What is marked behind a sequence's end is not read. See docs/resets.md.
        reset_to: state as hx; None for zeros.
        recompute: True saves the input of each layer alone for the backward pass, which runs the layer again: the same
            bits in less memory and more time (docs/memory.md).
        cell_options: zoneout, dropout within the recurrence, layer norm and blocks (`seqkernels.CellOptions`).
        norms: with layer_norm, for each layer, for each direction: scale_ih and scale_hh ``[G*H]``, of LSTM scale_c and
            with bias shift_c ``[H]``; of "gates" scale ``[G*H]`` alone. See docs/cells.md.
        backend: force one of `seqkernels.select.BACKENDS`.

    Returns:
        output in the layout of the input, with D*H features, and h_n ``[L*D, B, H]``.

    Raises:
        ValueError, RuntimeError, TypeError: torch.nn's own for what does not fit; ValueError for lengths,
            cu_seqlens, a mask or cell_options that do not fit, and where no backend can run the call; TypeError for a
            recompute that is no bool.
    """
    checks.check_function(weights, num_layers, dropout)
    return recurrent(
        "gru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, reset=reset, reset_to=reset_to, recompute=recompute,
        cell_options=cell_options, norms=norms, backend=backend,
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
    reset: Tensor | PackedSequence | None = None,
    reset_to: Tensor | None = None,
    recompute: bool = False,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN over whole sequences; arguments, results and errors as `gru`, and nonlinearity "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    checks.check_function(weights, num_layers, dropout)
    return recurrent(
        "rnn_" + nonlinearity, input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout,
        training=training, bidirectional=bidirectional, batch_first=batch_first, lengths=lengths,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, reset=reset, reset_to=reset_to, recompute=recompute,
        cell_options=cell_options, norms=norms, backend=backend,
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
    reset: Tensor | PackedSequence | None = None,
    reset_to: tuple[Tensor, Tensor] | None = None,
    recompute: bool = False,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """LSTM over whole sequences; arguments, results and errors as `gru`, but for the states.

    hx is (h_0, c_0), and (h_n, c_n) is returned; each ``[L*D, B, H]`` (unbatched ``[L*D, H]``). weights may hold a
    projection w_hr ``[P, H]`` behind each direction's others: then h and the output have P features for H.
    """
    checks.check_function(weights, num_layers, dropout)
    return recurrent(
        "lstm", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, reset=reset, reset_to=reset_to, recompute=recompute,
        cell_options=cell_options, norms=norms, backend=backend,
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
    reset: Tensor | PackedSequence | None = None,
    reset_to: Tensor | None = None,
    recompute: bool = False,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Light GRU over whole sequences (formula at `seqkernels.LiGRU`); arguments, results and errors as `gru`, with
    w_ih ``[2*H, I]`` and w_hh ``[2*H, H]``."""
    checks.check_function(weights, num_layers, dropout)
    return recurrent(
        "ligru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, reset=reset, reset_to=reset_to, recompute=recompute,
        cell_options=cell_options, norms=norms, backend=backend,
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
    reset: Tensor | PackedSequence | None = None,
    reset_to: State | None = None,
    recompute: bool = False,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
    backend: str | None = None,
    kept_by: "_Recurrent | None" = None,
):
    """What the functions above and the modules have in common; `cell`: of `seqkernels.backends.cells.CELLS`, `kept_by`:
    the module that may keep packed weights."""
    directions = 2 if bidirectional else 1
    checks.check_flag("recompute", recompute)
    parts = with_options.parts_of(cell, weights, cell_options, norms, training, num_layers * directions, bias)
    dropout = dropout if training else 0.0
    if onnx_export.exporting():
        onnx_export.check_no_reset(reset)
        onnx_export.check_no_options(parts)
        of_export = num_layers, directions, dropout, batch_first, lengths, cu_seqlens, bias
        return onnx_export.recurrent(cell, input, hx, weights, *of_export)
    ragged, transformed = (lengths, cu_seqlens, max_seqlen, reset, reset_to), modes.transformed()
    if parts is None and not dropout and transformed and all(option is None for option in ragged):
        of_layers = num_layers, directions, batch_first, bias, recompute, backend
        if results := ensembles.recurrent(cell, input, hx, weights, *of_layers):
            return results
    more = bias, parts is None, 1 if parts is None else parts.cell_options.blocks, backend, transformed
    inputs = prepare(cell, input, hx, weights, num_layers, directions, batch_first, *ragged, *more)
    plan, together = planned(inputs, weights, dropout, recompute, parts, backend)
    if kept_by is not None and together and parts is None:
        plan = kept_weights.keeping(kept_by, plan, inputs.save)
    return restore_layout(inputs, *run(plan, inputs, weights, together, dropout, recompute, parts))


def planned(
    inputs: Inputs,
    weights: Sequence[Tensor],
    dropout: float,
    recompute: bool,
    parts: with_options.Parts | None,
    backend: str | None,
) -> tuple[select.Plan, bool]:
    """The plan of a call, with options or without; and whether all layers are one call of the operator."""
    layers = inputs.call.layers
    if layers == 1:
        return plan_of(inputs, parts, backend), True
    # It knows no dropout; nor layers that are frozen below others, whose gradients it would compute, nor to run again
    # one layer at a time.
    again = inputs.save and recompute
    together = dropout == 0 and not again and _want_alike(weights, len(weights) // layers)
    if together and not (parts and parts.by_layer):
        inputs = inputs._replace(call=inputs.call._replace(together=True))
    plan = plan_of(inputs, parts, backend)
    return plan, together or (plan.backend == "cudnn" and dropout == 0)  # which cannot leave out any gradients


def plan_of(inputs: Inputs, parts: with_options.Parts | None, backend: str | None) -> select.Plan:
    """The plan of a call whose layers are calls of their own, unless its inputs say otherwise."""
    if parts is not None:
        return with_options.plan_of(inputs, parts, backend)
    return select.plan_of(inputs.call, inputs.rows.data.device, backend)


def run(
    plan: select.Plan,
    inputs: Inputs,
    weights: Sequence[Tensor],
    together: bool,
    dropout: float,
    recompute: bool = False,
    parts: with_options.Parts | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, with dropout between them -> y, h_n, c_n; together: as `planned` says."""
    if parts is not None and parts.by_layer:
        return with_options.run(plan, inputs, weights, parts, dropout, recompute)
    if parts is not None:
        weights = with_options.dropped(weights, parts, len(inputs.h_0))
    rows, h_0, c_0, _, save, call = inputs
    y, batch_sizes, layers = rows.data, rows.batch_sizes, call.layers
    of_all = plan, call, y, weights, h_0, c_0, batch_sizes, save, recompute, rows.pieces
    if together:
        return ops.recurrence_forward(*of_all)
    of_one, h_n, c_n = call._replace(layers=1), [], []
    for layer, (of_layer, begin_h, begin_c) in enumerate(stack.each(layers, weights, h_0, c_0)):
        if layer and dropout > 0:
            y = F.dropout(y, dropout, True)
        wanted = modes.wants_gradients(y, begin_h, begin_c, *of_layer)
        of_stack = y, of_layer, begin_h, begin_c, batch_sizes
        y, h, c = ops.recurrence_forward(plan, of_one, *of_stack, wanted, recompute, rows.pieces)
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
    call, save = facts_of_step(cell, input, weights, h_0, c_0)
    plan = select.plan_of(call, input.device, backend)
    # With a single step y is h.
    states = h_0.unsqueeze(0), None if c_0 is None else c_0.unsqueeze(0)
    y, _, c = ops.recurrence_forward(plan, call, input, weights, *states, None, save)
    return y, c if c_0 is None else c.squeeze(0)
