"""RNN, GRU, LSTM and LiGRU as functions: layers, directions and dropout around the operator pair.

Results, argument checks and their messages are those of torch.nn's modules
(https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html and its siblings).
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, hardware, ops, select, varlen
from seqkernels.backends.call import Call, class_of_steps
from seqkernels.backends.cells import CELLS
from seqkernels.backends.precision import computed_dtype
from seqkernels.checks import State

_log = logging.getLogger("seqkernels")


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
        backend: force one of `seqkernels.select.BACKENDS`.

    Returns:
        output in the layout of the input, with D*H features, and h_n ``[L*D, B, H]``.

    Raises:
        ValueError, RuntimeError, TypeError: torch.nn's own for what does not fit; ValueError for lengths or cu_seqlens
            that do not fit, and where no backend can run the call.
    """
    return recurrent(
        "gru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, backend=backend,
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
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN over whole sequences; arguments as `gru`, and nonlinearity "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return recurrent(
        "rnn_" + nonlinearity, input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout,
        training=training, bidirectional=bidirectional, batch_first=batch_first, lengths=lengths,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=backend,
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
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """LSTM over whole sequences; arguments as `gru`, with hx = (h_0, c_0) and (h_n, c_n) returned.

    weights may hold a projection w_hr ``[P, H]`` behind each direction's others: then h has P features.
    """
    return recurrent(
        "lstm", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, backend=backend,
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
    backend: str | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Light GRU over whole sequences (formula at `seqkernels.LiGRU`); arguments as `gru`, with w_ih ``[2*H, I]``."""
    return recurrent(
        "ligru", input, hx, weights, bias=bias, num_layers=num_layers, dropout=dropout, training=training,
        bidirectional=bidirectional, batch_first=batch_first, lengths=lengths, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, backend=backend,
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
    backend: str | None = None,
):
    """What the functions above have in common; `cell` is the name of one of `seqkernels.backends.cells.CELLS`."""
    directions = 2 if bidirectional else 1
    checks.count_weights(len(weights), num_layers * directions, bias, cell)
    inputs = prepare(cell, input, hx, weights, num_layers, directions, batch_first, lengths, cu_seqlens, max_seqlen)
    plan = plan_of(inputs.call, inputs.rows.data.device, backend)
    y, h_n, c_n = _run(plan, inputs, weights, dropout if training else 0.0)
    h_n = _restore(h_n, inputs)
    return inputs.rows.restore_layout(y), (h_n if inputs.c_0 is None else (h_n, _restore(c_n, inputs)))


class Inputs(NamedTuple):
    """The arguments of a call, checked, as operators take them; and as `select` sees them."""

    rows: varlen.Rows
    h_0: Tensor  # [L*D, B, P], in the order of the rows
    c_0: Tensor | None  # [L*D, B, H]
    unbatched: bool
    call: Call


def prepare(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Inputs:
    """Check a call's arguments and bring them into the layout of the operators; a padded batch is not copied."""
    unbatched = checks.is_unbatched(cell, input, hx, lengths, cu_seqlens)
    data = input.data if isinstance(input, PackedSequence) else input
    checks.check_input(data, weights[0], 3 if data is input and cu_seqlens is None else 2)
    hx = _unsqueeze(hx) if unbatched else hx
    transformed = ops.transformed()
    rows = _rows_of(input, hx, batch_first, lengths, cu_seqlens, max_seqlen, transformed)
    h_0, c_0 = _initial_state(cell, hx, rows, weights[1], num_layers * directions)
    call = call_of(cell, rows.data, weights, h_0, c_0, rows.batch_sizes, transformed, num_layers, directions)
    return Inputs(rows, h_0, c_0, unbatched, call)


def _rows_of(
    input: Tensor | PackedSequence,
    hx: State | None,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    transformed: bool,
) -> varlen.Rows:
    if isinstance(input, PackedSequence):
        return varlen.from_packed(input, None if hx is None else _first(hx).shape[1])
    if cu_seqlens is not None:
        return varlen.from_cu_seqlens(input, cu_seqlens, max_seqlen, transformed)
    if lengths is not None:
        return varlen.from_lengths(input, lengths, batch_first, transformed)
    return varlen.from_unbatched(input) if input.dim() == 2 else varlen.from_padded(input, batch_first)


def call_of(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    transformed: bool,
    num_layers: int = 1,
    directions: int = 1,
    one_step: bool = False,
) -> Call:
    """The facts of a call on rows x ``[N, I]`` from states ``[L*D, B, *]``, or of one step of a cell."""
    device = x.device
    if torch.compiler.is_compiling():  # no size is asked for, as that would put a guard on it
        return Call(
            cell=cell,
            device_type=device.type,
            dtype=x.dtype,
            transformed=transformed,
            compiled=True,
            layers=num_layers,
            directions=directions,
        )
    sequences = h_0.shape[-2]
    layout, steps = "cell" if one_step else "padded", x.shape[0] // max(sequences, 1)
    if batch_sizes is not None:
        layout, steps = "packed" if batch_sizes.device.type == "cpu" else "device", len(batch_sizes)
    dtype = computed_dtype(x)
    return Call(
        cell=cell,
        device_type=device.type,
        dtype=dtype,
        transformed=transformed,
        hidden_size=weights[1].shape[0] // CELLS[cell].gates,
        projected=len(weights) // (num_layers * directions) % 2 == 1,
        tf32=dtype == torch.float32 and hardware.tf32(device),
        input_size=x.shape[1],
        layers=num_layers,
        directions=directions,
        sequences=sequences,
        steps=class_of_steps(steps),
        layout=layout,
        training=ops.wants_gradients(x, h_0, c_0, *weights),
        cudnn=torch.backends.cudnn.enabled,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        capturing=x.is_cuda and layout == "packed" and torch.cuda.is_current_stream_capturing(),
    )


def call_of_step(cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor | None = None) -> Call:
    """The facts of one step of a cell: x ``[B, I]``, states ``[B, H]``."""
    return call_of(cell, x, weights, h_0, c_0, None, ops.transformed(), one_step=True)


def plan_of(call: Call, device: torch.device, backend: str | None) -> select.Plan:
    """The plan of a call, the same object for every call like it."""
    machine = hardware.machine_of(device)
    if torch.compiler.is_compiling():
        return select.plan(call, machine, backend)
    plan = select.planned(call, machine, backend)
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s sequences %d: %s", call.cell, call.sequences, plan)
    return plan


def _run(plan: select.Plan, inputs: Inputs, weights: Sequence[Tensor], dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, with dropout between them -> y, h_n, c_n."""
    (y, batch_sizes, *_), h_0, c_0, _, call = inputs
    layers, directions = call.layers, call.directions
    # cuDNN takes all layers at once, unless there is dropout between them: its own could not be differentiated twice.
    if layers == 1 or (plan.backend == "cudnn" and dropout == 0):
        return ops.recurrence_forward(plan, call, y, weights, h_0, c_0, batch_sizes)
    h_n, c_n, each = [], [], len(weights) // layers
    for layer in range(layers):
        if layer and dropout > 0:
            y = F.dropout(y, dropout, True)
        here = slice(layer * directions, (layer + 1) * directions)
        of_layer = weights[layer * each : (layer + 1) * each]
        states = h_0[here], None if c_0 is None else c_0[here]
        y, h, c = ops.recurrence_forward(plan, call._replace(layers=1), y, of_layer, *states, batch_sizes)
        h_n.append(h)
        c_n.append(c)
    return y, torch.cat(h_n), torch.cat(c_n)


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
    checks.check_step(input, (h_0,) if c_0 is None else (h_0, c_0), *weights[:2])
    call = call_of_step(cell, input, weights, h_0, c_0)
    plan = plan_of(call, input.device, backend)
    # With a single step y is h.
    states = h_0.unsqueeze(0), None if c_0 is None else c_0.unsqueeze(0)
    y, _, c = ops.recurrence_forward(plan, call, input, weights, *states, None)
    return y, c if c_0 is None else c.squeeze(0)


def _initial_state(
    cell: str, hx: State | None, rows: varlen.Rows, w_hh: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    """(h_0, c_0) in the order of the rows: the given state, checked, or zeros."""
    hidden, has_c = w_hh.shape[0] // CELLS[cell].gates, CELLS[cell].states == 2
    h_size, c_size = (count, rows.sequences, w_hh.shape[1]), (count, rows.sequences, hidden)
    if hx is None:
        h_0 = rows.data.new_zeros(h_size)
        return h_0, rows.data.new_zeros(c_size) if has_c else None
    c_0: Tensor | None = None
    if has_c:
        h_0, c_0 = hx
        checks.check_state(h_0, h_size, rows.data, "Expected hidden[0] size {}, got {}")
        checks.check_state(c_0, c_size, rows.data, "Expected hidden[1] size {}, got {}")
    else:
        h_0 = _first(hx)
        checks.check_state(h_0, h_size, rows.data, "Expected hidden size {}, got {}")
    if rows.sorted_indices is None:
        return h_0, c_0
    return h_0.index_select(1, rows.sorted_indices), None if c_0 is None else c_0.index_select(1, rows.sorted_indices)


def _first(hx: State) -> Tensor:
    return hx if isinstance(hx, Tensor) else hx[0]


def _unsqueeze(hx: State | None) -> State | None:
    if hx is None or isinstance(hx, Tensor):
        return hx if hx is None else hx.unsqueeze(1)
    return hx[0].unsqueeze(1), hx[1].unsqueeze(1)


def _restore(state: Tensor, inputs: Inputs) -> Tensor:
    """A final state ``[L*D, B, *]`` in the user's order of sequences."""
    unsorted_indices = inputs.rows.unsorted_indices
    if unsorted_indices is not None:
        state = state.index_select(1, unsorted_indices)
    return state.squeeze(1) if inputs.unbatched else state
