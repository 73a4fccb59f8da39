"""A call's arguments, checked, as the operators take them and as `select` sees them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, hardware, late_checks, modes, resets, varlen
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
    save: bool  # gradients are wanted
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
    reset: Tensor | PackedSequence | None = None,
    reset_to: State | None = None,
    bias: bool = True,
) -> Inputs:
    """Check a call's arguments and bring them into the layout of the operators; a padded batch is not copied."""
    if not torch.compiler.is_compiling():
        late_checks.look()
    unbatched = checks.check_call(cell, input, hx, weights, num_layers * directions, bias, lengths, cu_seqlens)
    transformed = modes.transformed()
    checks.check_reset_to(cell, reset, reset_to)
    if unbatched:
        hx, reset_to = _with_batch(hx), _with_batch(reset_to)
    h_0 = hx if hx is None or isinstance(hx, Tensor) else hx[0]
    given = None if h_0 is None else h_0.shape[1]
    mask = None if reset is None else resets.mask_of(reset, input, cu_seqlens)
    if mask is not None and not resets.marks_nothing(mask):
        rows = resets.cut(input, mask, batch_first, lengths, cu_seqlens, max_seqlen, given, transformed)
    elif isinstance(input, PackedSequence):
        rows = varlen.from_packed(input, given)
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
    h_0, c_0 = _initial_state(cell, hx, reset_to, rows, weights[1], num_layers * directions, transformed)
    sizes = rows.batch_sizes, transformed, num_layers, directions
    call, save = _facts_of(cell, rows.data, weights, h_0, c_0, *sizes)
    return Inputs(rows, h_0, c_0, unbatched, save, call)


def facts_of_step(
    cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor | None = None
) -> tuple[Call, bool]:
    """One step of a cell, x ``[B, I]`` and states ``[B, H]``, as `select` sees it; and whether gradients are wanted."""
    return _facts_of(cell, x, weights, h_0, c_0, None, modes.transformed(), one_step=True)


def _facts_of(
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
) -> tuple[Call, bool]:
    """A call on rows x ``[N, I]`` from states ``[L*D, B, *]``, or one step of a cell, as `select` sees it; and whether
    gradients are wanted."""
    device, training = x.device, modes.wants_gradients(x, h_0, c_0, *weights)
    parts = hardware.bfloat16_parts(device, x.dtype)
    vmapped = transformed and modes.only_vmap()
    transformed = transformed and not vmapped
    # When compiling no size is asked for, as that would put a guard on it; torch.jit.trace has none that is a number;
    # on a CPU there is nothing to weigh.
    compiled = torch.compiler.is_compiling()
    if compiled or torch._C._get_tracing_state() is not None or (device.type == "cpu" and not hardware.STAND_INS):
        make = Call if compiled else _call_without_sizes
        call = make(cell, device.type, x.dtype, transformed, compiled, num_layers, directions)
        if vmapped or parts:
            call = call._replace(vmapped=vmapped, bfloat16_parts=parts)
        return call, training
    sequences = h_0.shape[-2]
    layout, steps = "cell" if one_step else "padded", x.shape[0] // max(sequences, 1)
    if batch_sizes is not None:
        layout, steps = "packed" if batch_sizes.device.type == "cpu" else "device", len(batch_sizes)
    dtype = modes.computed_dtype(x)
    call = Call(
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
        bfloat16_parts=parts,
        vmapped=vmapped,
    )
    return call, training


# Calls that differ in their sizes alone are the same object, which also finds its plan faster.
_call_without_sizes = functools.lru_cache(1024)(Call)


def restore_layout(inputs: Inputs, y: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor | PackedSequence, State]:
    """Results of the operators, y ``[N, D*P]`` and states ``[L*D, B, *]``, in the layout of the user's input."""
    rows, has_c = inputs.rows, inputs.c_0 is not None
    if rows.unsorted_indices is not None:
        h_n = h_n.index_select(1, rows.unsorted_indices)
        c_n = c_n.index_select(1, rows.unsorted_indices) if has_c else c_n
    if inputs.unbatched:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1) if has_c else c_n
    return rows.restore_layout(y), (h_n, c_n) if has_c else h_n


def _with_batch(state: State | None) -> State | None:
    """The state of an unbatched sequence as that of a batch of one."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.unsqueeze(1)
    return state[0].unsqueeze(1), state[1].unsqueeze(1)


def _initial_state(
    cell: str,
    hx: State | None,
    reset_to: State | None,
    rows: varlen.Rows,
    w_hh: Tensor,
    count: int,
    transformed: bool,
) -> tuple[Tensor, Tensor | None]:
    """(h_0, c_0) in the order of the rows: the given states, checked, or zeros."""
    features = [w_hh.shape[1], w_hh.shape[0] // CELLS[cell].gates][: CELLS[cell].states]
    if hx is None and reset_to is None:
        h_0, *c_0 = (rows.data.new_zeros(count, rows.sequences, size) for size in features)
        return h_0, c_0[0] if c_0 else None
    # Of pieces of sequences there are more than states.
    sequences = rows.sequences if rows.unsorted_indices is None else rows.unsorted_indices.shape[0]
    sizes = [(count, sequences, size) for size in features]
    begin = _given_state(hx, sizes, rows.data, "hidden", transformed)
    others = None if reset_to is None else _given_state(reset_to, sizes, rows.data, "reset_to", transformed)
    if rows.sorted_indices is not None:
        begin = [state.index_select(1, rows.sorted_indices) for state in begin]
    if rows.anew is not None:
        begin = resets.begin_anew(begin, others, rows)
    return begin[0], begin[1] if len(begin) == 2 else None


def _given_state(
    state: State | None, sizes: Sequence[tuple[int, ...]], data: Tensor, name: str, transformed: bool
) -> list[Tensor]:
    """The tensors of a state, checked, or zeros."""
    if state is None:
        return [data.new_zeros(size) for size in sizes]
    found = [state] if isinstance(state, Tensor) else list(state)
    for k, (tensor, size) in enumerate(zip(found, sizes, strict=True)):
        which = f"{name}[{k}]" if len(sizes) == 2 else name
        checks.check_state(tensor, size, data, f"Expected {which} size {{}}, got {{}}", name)
        # torch selects from a freed storage all the same
        if not (torch.compiler.is_compiling() or transformed):
            arguments.expect_storage(**{f"{'hc'[k]}_0" if name == "hidden" else which: tensor})
    return found
