"""A call's arguments, checked, as the operators take them and as `select` sees them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, hardware, late_checks, modes, varlen
from seqkernels.backends import arguments
from seqkernels.backends.call import Call, class_of_steps
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State


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
    if not torch.compiler.is_compiling():
        late_checks.look()
    transformed = modes.transformed()
    unbatched = checks.is_unbatched(cell, input, hx, lengths, cu_seqlens)
    data = input.data if isinstance(input, PackedSequence) else input
    checks.check_input(data, weights, 3 if data is input and cu_seqlens is None else 2)
    if hx is not None and unbatched:
        hx = hx.unsqueeze(1) if isinstance(hx, Tensor) else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    if isinstance(input, PackedSequence):
        h_0 = hx if hx is None or isinstance(hx, Tensor) else hx[0]
        rows = varlen.from_packed(input, None if h_0 is None else h_0.shape[1])
    elif cu_seqlens is not None:
        rows = varlen.from_cu_seqlens(input, cu_seqlens, max_seqlen, transformed)
    elif lengths is not None:
        rows = varlen.from_lengths(input, lengths, batch_first, transformed)
    elif unbatched:
        rows = varlen.from_unbatched(input)
    elif input.is_nested:
        rows = varlen.from_nested(input, transformed)
    else:
        rows = varlen.from_padded(input, batch_first)
    h_0, c_0 = _initial_state(cell, hx, rows, weights[1], num_layers * directions, transformed)
    call = call_of(cell, rows.data, weights, h_0, c_0, rows.batch_sizes, transformed, num_layers, directions)
    return Inputs(rows, h_0, c_0, unbatched, call)


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
    vmapped = transformed and modes.only_vmap()
    transformed = transformed and not vmapped
    # When compiling no size is asked for, as that would put a guard on it; torch.jit.trace has none that is a number;
    # on a CPU there is nothing to weigh.
    compiled = torch.compiler.is_compiling()
    if compiled or torch._C._get_tracing_state() is not None or (device.type == "cpu" and not hardware.STAND_INS):
        make = Call if compiled else _call_without_sizes
        call = make(cell, device.type, x.dtype, transformed, compiled, num_layers, directions)
        return call._replace(vmapped=True) if vmapped else call
    sequences = h_0.shape[-2]
    layout, steps = "cell" if one_step else "padded", x.shape[0] // max(sequences, 1)
    if batch_sizes is not None:
        layout, steps = "packed" if batch_sizes.device.type == "cpu" else "device", len(batch_sizes)
    dtype, training = modes.computed_dtype(x), modes.wants_gradients(x, h_0, c_0, *weights)
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
        training=training,
        cudnn=torch.backends.cudnn.enabled,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        capturing=x.is_cuda and layout == "packed" and torch.cuda.is_current_stream_capturing(),
        vmapped=vmapped,
    )


# Calls that differ in their sizes alone are the same object, which also finds its plan faster.
_call_without_sizes = functools.lru_cache(1024)(Call)


def call_of_step(cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor | None = None) -> Call:
    """The facts of one step of a cell: x ``[B, I]``, states ``[B, H]``."""
    return call_of(cell, x, weights, h_0, c_0, None, modes.transformed(), one_step=True)


def _initial_state(
    cell: str, hx: State | None, rows: varlen.Rows, w_hh: Tensor, count: int, transformed: bool
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
        assert isinstance(hx, Tensor)
        h_0 = hx
        checks.check_state(h_0, h_size, rows.data, "Expected hidden size {}, got {}")
    if rows.sorted_indices is None:
        return h_0, c_0
    if not (torch.compiler.is_compiling() or transformed):  # torch selects from a freed storage all the same
        for name, state in (("h_0", h_0), ("c_0", c_0)):
            if state is not None:
                arguments.expect_storage(name, state)
    return h_0.index_select(1, rows.sorted_indices), None if c_0 is None else c_0.index_select(1, rows.sorted_indices)
