"""RNN, GRU and LSTM as functions: checks, layers, directions and dropout around the operator pair.

Results, argument checks and their messages are those of torch.nn's modules
(https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html and its siblings).
"""

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import hardware, ops, select, varlen
from seqkernels.backends import GATES

_log = logging.getLogger("seqkernels")

State = Tensor | tuple[Tensor, Tensor]


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    **options,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Elman RNN over whole sequences; arguments as `gru`, and nonlinearity "tanh" or "relu"."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    return recurrent("rnn_" + nonlinearity, input, hx, weights, **options)


def gru(
    input: Tensor | PackedSequence, hx: Tensor | None, weights: Sequence[Tensor], **options
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
    return recurrent("gru", input, hx, weights, **options)


def lstm(
    input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None, weights: Sequence[Tensor], **options
) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
    """LSTM over whole sequences; arguments as `gru`, with hx = (h_0, c_0) and (h_n, c_n) returned.

    weights may hold a projection w_hr ``[P, H]`` behind each direction's others: then h has P features.
    """
    return recurrent("lstm", input, hx, weights, **options)


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
) -> tuple[Tensor | PackedSequence, State]:
    """What `rnn`, `gru` and `lstm` have in common; `cell` is one of rnn_tanh, rnn_relu, gru, lstm."""
    directions = 2 if bidirectional else 1
    per_layer = directions * _weights_of_direction(len(weights), num_layers * directions, bias, cell)
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    unbatched = _check_dimensions(cell, input, hx, lengths, cu_seqlens)
    _check_input(data, weights[0], 2 if packed or cu_seqlens is not None else 3)
    hx = _unsqueeze(hx) if unbatched else hx
    transformed = ops.transformed()
    if packed:
        rows = varlen.from_packed(input, None if hx is None else _first(hx).shape[1])
    elif cu_seqlens is not None:
        rows = varlen.from_cu_seqlens(input, cu_seqlens, max_seqlen, transformed)
    elif lengths is not None:
        rows = varlen.from_lengths(input, lengths, batch_first, transformed)
    elif unbatched:
        rows = varlen.from_unbatched(input)
    else:
        rows = varlen.from_padded(input, batch_first)
    h_0, c_0 = _initial_state(cell, hx, rows, weights[1], num_layers * directions)
    layers = num_layers, directions
    plan = plan_of(cell, rows.data, weights, (h_0, c_0), rows.sequences, rows.batch_sizes, layers, transformed, backend)
    if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s rows %d sequences %d: %s", cell, rows.data.shape[0], rows.sequences, plan)

    # cuDNN takes all layers at once, unless there is dropout between them: its own could not be differentiated twice.
    drops = dropout > 0 and training
    at_once = num_layers if plan.backend == "cudnn" and not drops else 1
    if num_layers == at_once:
        y, h_n, c_n = ops.recurrence_forward(
            plan, cell, rows.data, weights, h_0, c_0, rows.batch_sizes, transformed, num_layers
        )
    else:
        y, h_n, c_n = rows.data, [], []
        for layer in range(num_layers):
            if layer and drops:
                y = F.dropout(y, dropout, training)
            here = slice(layer * directions, (layer + 1) * directions)
            y, h, c = ops.recurrence_forward(
                plan,
                cell,
                y,
                weights[layer * per_layer : (layer + 1) * per_layer],
                h_0[here],
                None if c_0 is None else c_0[here],
                rows.batch_sizes,
                transformed,
            )
            h_n.append(h)
            c_n.append(c)
        h_n, c_n = torch.cat(h_n), torch.cat(c_n)
    h_n = _restored(h_n, rows.unsorted_indices, unbatched)
    return rows.leave(y), ((h_n, _restored(c_n, rows.unsorted_indices, unbatched)) if cell == "lstm" else h_n)


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
    w_ih, w_hh = weights[:2]
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}")
    for k, state in enumerate((h_0,) if c_0 is None else (h_0, c_0)):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
        if state.shape[1] != w_hh.shape[1]:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {w_hh.shape[1]}"
            )
        _check_same(state, input)
    _check_same(w_ih, input, "parameter")
    transformed = ops.transformed()
    plan = plan_of(cell, input, weights, (h_0, c_0), input.shape[0], None, None, transformed, backend)
    c_0 = None if c_0 is None else c_0.unsqueeze(0)
    # With a single step y is h.
    y, _, c = ops.recurrence_forward(plan, cell, input, weights, h_0.unsqueeze(0), c_0, None, transformed)
    return y, c.squeeze(0) if cell == "lstm" else c


def plan_of(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    sequences: int,
    batch_sizes: Tensor | None,
    layers: tuple[int, int] | None,
    transformed: bool,
    backend: str | None,
) -> select.Plan:
    """The plan of a call on rows x ``[N, I]``, kept for the next one like it; `layers`: their number and that of their
    directions, None for one step of a cell."""
    if torch.compiler.is_compiling():
        return _chosen(cell, x.device, x.dtype, transformed, backend, compiled=True)
    if not (x.is_cuda or (hardware.THIS_MACHINE.cudnn_on_cpu and x.is_cpu)):
        return _cached_plan(cell, x.device, x.dtype, transformed, backend)  # on a CPU there is nothing to weigh
    facts = _facts(cell, x, weights, states, sequences, batch_sizes, layers)
    return _cached_plan(cell, x.device, ops.computed_dtype(x), transformed, backend, *facts)


def _facts(cell, x, weights, states, sequences, batch_sizes, layers) -> tuple:
    """The fields of `select.Call` that a choice on a GPU depends on."""
    layout = "cell" if layers is None else "padded"
    steps = 1 if layers is None else x.shape[0] // max(sequences, 1)
    if batch_sizes is not None:
        steps, layout = len(batch_sizes), "packed" if batch_sizes.device.type == "cpu" else "device"
    number, directions = layers or (1, 1)
    return (
        weights[1].shape[0] // GATES[cell],
        len(weights) // (number * directions) % 2 == 1,
        hardware.tf32(x.device),
        x.shape[1],
        number,
        directions,
        select.class_of_sequences(sequences),
        select.class_of_steps(steps),
        layout,
        ops.wants_gradients(x, *states, *weights),
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        x.is_cuda and layout == "packed" and torch.cuda.is_current_stream_capturing(),
    )


def _chosen(
    cell: str, device: torch.device, dtype, transformed: bool, backend: str | None, *facts, compiled: bool = False
) -> select.Plan:
    call = select.Call(cell, device.type, dtype, transformed, *facts, compiled=compiled)
    return select.plan(call, hardware.machine_of(device), backend)


_cached_plan = functools.lru_cache(maxsize=4096)(_chosen)


def _weights_of_direction(given: int, count: int, bias: bool, cell: str) -> int:
    """How many weights each of `count` layers and directions has."""
    each = given // count
    kinds = 4 if bias else 2
    if each * count != given or not (each == kinds or (cell == "lstm" and each == kinds + 1)):
        raise ValueError(
            f"expected {kinds} weights{' (or one more, a projection)' if cell == 'lstm' else ''} for each of "
            f"{count} layers and directions, got {given} in all"
        )
    return each


def _initial_state(
    cell: str, hx: State | None, rows: varlen.Rows, w_hh: Tensor, count: int
) -> tuple[Tensor, Tensor | None]:
    """(h_0, c_0) in the order of the rows: the given state, checked, or zeros."""
    hidden = w_hh.shape[0] // GATES[cell]
    h_size, c_size = (count, rows.sequences, w_hh.shape[1]), (count, rows.sequences, hidden)
    if hx is None:
        h_0 = rows.data.new_zeros(h_size)
        return h_0, rows.data.new_zeros(c_size) if cell == "lstm" else None
    if cell == "lstm":
        h_0, c_0 = hx
        _check_state(h_0, h_size, rows.data, "Expected hidden[0] size {}, got {}")
        _check_state(c_0, c_size, rows.data, "Expected hidden[1] size {}, got {}")
    else:
        h_0, c_0 = hx, None
        _check_state(h_0, h_size, rows.data, "Expected hidden size {}, got {}")
    if rows.sorted_indices is None:
        return h_0, c_0
    return h_0.index_select(1, rows.sorted_indices), None if c_0 is None else c_0.index_select(1, rows.sorted_indices)


def _check_state(state: Tensor, size: tuple[int, ...], data: Tensor, message: str) -> None:
    if state.shape != size:
        raise RuntimeError(message.format(size, list(state.shape)))
    _check_same(state, data)


def _check_same(tensor: Tensor, data: Tensor, name: str = "hidden") -> None:
    """Device and dtype of a state or a weight are those of the input; autocast makes the dtypes equal by itself."""
    if tensor.device != data.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, found input tensor at {data.device} "
            f"and {name} tensor at {tensor.device}"
        )
    if tensor.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"RNN {name} tensor dtype ({tensor.dtype}) does not match input dtype ({data.dtype})")


_NAMES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}


def _check_dimensions(cell: str, input, hx: State | None, lengths, cu_seqlens) -> bool:
    """Whether the input is one unbatched sequence; raises where numbers of dimensions or options do not fit."""
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("give lengths or cu_seqlens, not both")
    if isinstance(input, PackedSequence):
        if lengths is not None or cu_seqlens is not None:
            raise ValueError("a PackedSequence has its lengths in it; give no lengths or cu_seqlens beside it")
        return False
    if cu_seqlens is not None:
        return False
    name = _NAMES[cell]
    if input.dim() not in (2, 3):
        raise ValueError(
            f"{name}: Expected input to be 2D or 3D, got {input.dim()}D {'tensor ' if name == 'RNN' else ''}instead"
        )
    unbatched = input.dim() == 2
    if unbatched and lengths is not None:
        raise ValueError("lengths go with a batch of sequences (3-D input); cut one unbatched sequence instead")
    dimensions = input.dim()
    if hx is not None and cell == "lstm" and (hx[0].dim() != dimensions or hx[1].dim() != dimensions):
        raise RuntimeError(
            f"For {'unbatched 2' if unbatched else 'batched 3'}-D input, hx and cx should also be {dimensions}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    if hx is not None and cell != "lstm" and hx.dim() != dimensions:
        raise RuntimeError(
            f"For {'unbatched 2' if unbatched else 'batched 3'}-D input, hx should also be {dimensions}-D "
            f"but got {hx.dim()}-D tensor"
        )
    return unbatched


def _check_input(data: Tensor, w_ih: Tensor, dimensions: int) -> None:
    if data.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({data.dtype})"
        )
    if data.dim() not in (2, dimensions):
        raise RuntimeError(f"input must have {dimensions} dimensions, got {data.dim()}")
    if data.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {data.shape[-1]}"
        )
    _check_same(w_ih, data, "parameter")


def _first(hx: State) -> Tensor:
    return hx if isinstance(hx, Tensor) else hx[0]


def _unsqueeze(hx: State | None) -> State | None:
    if hx is None or isinstance(hx, Tensor):
        return hx if hx is None else hx.unsqueeze(1)
    return hx[0].unsqueeze(1), hx[1].unsqueeze(1)


def _restored(state: Tensor, unsorted_indices: Tensor | None, unbatched: bool) -> Tensor:
    """A final state ``[L*D, B, *]`` in the user's order of sequences."""
    if unsorted_indices is not None:
        state = state.index_select(1, unsorted_indices)
    return state.squeeze(1) if unbatched else state
