"""A call's arguments, checked, as the operators take them and as `select` sees them."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, hardware, late_checks, modes, resets, varlen
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State
from seqkernels.storage import expect_storage


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
    pieces: bool = False,
    blocks: int = 1,
    backend: str | None = None,
    transformed: bool | None = None,
) -> Inputs:
    """Check a call's arguments and bring them into the layout of the operators; a padded batch is not copied.

    pieces: operators run the call, by `backend` if it is forced, which take sequences that consist of pieces.
    transformed: what `modes.transformed` says, where the caller has asked.
    """
    if lengths is None and cu_seqlens is None and not torch.compiler.is_compiling():  # their own checks look as well
        late_checks.look()
    ragged = lengths, cu_seqlens, reset, reset_to
    unbatched, mask = checks.check_call(cell, input, hx, weights, num_layers * directions, bias, *ragged)
    transformed = modes.transformed() if transformed is None else transformed
    if unbatched:
        hx, reset_to = _with_batch(hx), _with_batch(reset_to)
    h_0 = hx if hx is None or isinstance(hx, Tensor) else hx[0]
    given = None if h_0 is None else h_0.shape[1]
    layout = batch_first, lengths, cu_seqlens, max_seqlen, given, transformed

    def facts_of(rows: varlen.Rows, *states: Tensor | None) -> tuple[Call, bool]:
        sizes = rows.sequences, rows.batch_sizes, transformed, num_layers, directions
        return modes.facts_of(cell, rows.data, weights, states, *sizes)

    facts, projected = None, len(weights) // (num_layers * directions) % 2 == 1
    if mask is None:
        rows = varlen.rows_of(input, *layout)
    else:
        states = *_tensors(hx), *_tensors(reset_to)
        rows, facts = resets.rows_of(
            input, mask, layout, pieces, projected, backend, lambda rows: facts_of(rows, *states)
        )
    w_hh = weights[1]
    features = w_hh.shape[1] * blocks, w_hh.shape[0] // CELLS[cell].gates
    if features[0] != features[1] and not projected:
        checks.fail_on_columns(w_hh, features[1])
    h_0, c_0 = _initial_state(features[: CELLS[cell].states], hx, reset_to, rows, num_layers * directions, transformed)
    call, save = facts or facts_of(rows, h_0, c_0)
    if call.transformed and call.compiled and rows.batch_sizes is not None:
        _fail_without_steps()
    return Inputs(rows, h_0, c_0, unbatched, save, call)


@hardware.constant_in_traces  # else torch goes on without compiling, and fails within its own code
def _fail_without_steps() -> None:
    raise NotImplementedError(
        "torch.compile does not know the steps of a batch with lengths or resets, which torch.func's transforms other "
        "than vmap need: call them uncompiled, or give a padded batch"
    )


def _tensors(state: State | None) -> Sequence[Tensor]:
    return () if state is None else (state,) if isinstance(state, Tensor) else state


def facts_of_step(
    cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor | None = None
) -> tuple[Call, bool]:
    """One step of a cell, x ``[B, I]`` and states ``[B, H]``, as `select` sees it; and whether gradients are wanted."""
    states = (h_0, c_0), h_0.shape[-2]
    return modes.facts_of(cell, x, weights, *states, None, modes.transformed(), one_step=True)


def restore_layout(inputs: Inputs, y: Tensor, h_n: Tensor, c_n: Tensor) -> tuple[Tensor | PackedSequence, State]:
    """Results of the operators, y ``[N, D*P]`` and states ``[L*D, B, *]``, in the layout of the user's input."""
    rows, has_c = inputs.rows, inputs.c_0 is not None
    if rows.unsorted_indices is not None:
        h_n = h_n.index_select(1, rows.unsorted_indices)
        c_n = c_n.index_select(1, rows.unsorted_indices) if has_c else c_n
    if inputs.unbatched:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1) if has_c else c_n
    return rows.restore_layout(y), (h_n, c_n) if has_c else h_n


def restore_layers(inputs: Inputs, layers: Iterable[Tensor]) -> Tensor:
    """What layers have at every step, each ``[N, *]``, in the layout of the input, the layers stacked before it."""
    found = []
    for rows in layers:
        restored = inputs.rows.restore_layout(rows)
        if isinstance(restored, PackedSequence):
            restored = restored.data
        found.append(restored.values() if restored.is_nested else restored)
    return torch.stack(found)


def _with_batch(state: State | None) -> State | None:
    """The state of an unbatched sequence as that of a batch of one."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else state.unsqueeze(1)
    return state[0].unsqueeze(1), state[1].unsqueeze(1)


def _initial_state(
    features: tuple[int, ...],  # of h, and of c
    hx: State | None,
    reset_to: State | None,
    rows: varlen.Rows,
    count: int,
    transformed: bool,
) -> tuple[Tensor, Tensor | None]:
    """(h_0, c_0) in the order of the rows: the given states, checked, or zeros."""
    if hx is None and reset_to is None:
        h_0, *c_0 = (rows.data.new_zeros(count, rows.sequences, size) for size in features)
        return h_0, c_0[0] if c_0 else None
    # Of pieces of sequences there are more than states.
    sequences = rows.sequences if rows.unsorted_indices is None else rows.unsorted_indices.shape[0]
    sizes = [(count, sequences, size) for size in features]
    begin = _given_state(hx, sizes, rows.data, "hidden", transformed)
    others = None if reset_to is None else _given_state(reset_to, sizes, rows.data, "reset_to", transformed)
    if rows.anew is not None:
        begin = resets.begin_anew(begin, others, rows)
    elif rows.sorted_indices is not None:
        begin = [state.index_select(1, rows.sorted_indices) for state in begin]
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
            expect_storage((f"{'hc'[k]}_0" if name == "hidden" else which, tensor))
    return found
