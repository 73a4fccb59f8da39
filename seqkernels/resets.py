"""Resets inside of sequences: the state before each step that a mask marks begins anew.

Sequences are cut before marked steps, and each piece has a first and a last state of its own. The CPU's kernels, and
some of those for GPUs, go from one piece to the next, and rows stay where they are. For others the pieces run side by
side as those of a ragged batch: so every backend has resets, forward and backward, but what runs in a step is more than
without them.

Where nobody may read the mask (compiled code, a CUDA graph that is captured, torch.vmap over masks) there are as many
pieces as there could be, one for each row, and most of them are empty. Where rows stay, these are states alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import hardware, late_checks, select, varlen
from seqkernels._ops import ops
from seqkernels.backends.call import RESETS, Call
from seqkernels.hardware import THIS_MACHINE
from seqkernels.pieces import cut, marks_nothing, numbered, of_pieces, time_major
from seqkernels.varlen import Rows


def rows_of(
    input: Tensor | PackedSequence,
    mask: Tensor,
    layout: tuple,
    pieces: bool,
    projected: bool,
    backend: str | None,
    facts_of: Callable[[Rows], tuple[Call, bool]],
) -> tuple[Rows, tuple[Call, bool] | None]:
    """An input whose steps `mask` marks, as rows, by `layout` as `varlen.rows_of` takes it. With it, what `facts_of`
    says of the call, where the choice of a kernel has asked for that.

    pieces: operators run the call, by `backend` if it is forced, which take sequences that consist of pieces.
    """
    batch_first, lengths, cu_seqlens, _, _, transformed = layout
    if pieces and on_cpu(mask, input, transformed, backend):
        return in_place(input, mask, *layout), None
    if marks_nothing(mask):
        return varlen.rows_of(input, *layout), None
    if pieces and not (transformed or projected) and rows_lie(input, lengths, cu_seqlens):
        rows = varlen.rows_of(input, *layout)
        call, wanted = facts_of(rows)
        of_pieces = "device" if late_checks.out_of_sight(mask) else "packed"
        if select.goes_piecewise(call, of_pieces, hardware.machine_of(rows.data.device), backend):
            return numbered(input, mask, batch_first, rows), (call._replace(options=(RESETS,)), wanted)
    return cut(input, mask, *layout), None


def on_cpu(mask: Tensor, input: Tensor | PackedSequence, transformed: bool, backend: str | None) -> bool:
    """Whether the CPU's kernels run a call, if `backend` is not forced to another, where the number of pieces may be
    asked for."""
    if (backend or THIS_MACHINE.forced_backend or "cpu") != "cpu" or THIS_MACHINE.native_missing:
        return False
    data = input.data if isinstance(input, PackedSequence) else input
    here = data.device.type == "cpu" and not late_checks.out_of_sight(mask)
    return here and not transformed and not torch.compiler.is_compiling()


def rows_lie(input: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None, cu_seqlens: Tensor | None) -> bool:
    """Whether rows of the input are those of operators: of other layouts they are copied anyway."""
    return lengths is None and cu_seqlens is None and (isinstance(input, PackedSequence) or not input.is_nested)


def in_place(
    input: Tensor | PackedSequence,
    mask: Tensor,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    sequences: int | None,
    transformed: bool,
) -> Rows:
    """As `seqkernels.pieces.cut`, but of sequences whose rows stay where they are without resets."""

    def of_values(values: Tensor, offsets: Tensor, longest: int | None, transformed: bool) -> Rows:
        of_rows = (varlen.from_cu_seqlens(t, offsets, longest, transformed) for t in (values, marks))
        return _numbered(next(of_rows), next(of_rows).data.squeeze(1))

    if isinstance(input, PackedSequence):
        return _numbered(varlen.from_packed(input, sequences), mask)
    layout = batch_first, lengths, cu_seqlens, max_seqlen, sequences, transformed
    if rows_lie(input, lengths, cu_seqlens):
        return _numbered(varlen.rows_of(input, *layout), time_major(mask, batch_first))
    marks = mask.unsqueeze(-1)
    if input.is_nested:
        return varlen.from_nested(input, transformed, of_values)
    return _numbered(varlen.rows_of(input, *layout), varlen.rows_of(marks, *layout).data.squeeze(1))


def begin_anew(states: Sequence[Tensor], others: Sequence[Tensor] | None, rows: Rows) -> list[Tensor]:
    """The states ``[L*D, C, *]`` that pieces begin with: those of `states` ``[L*D, B, *]``, or where a mark is of
    `others`, as those, zeros if None."""
    assert rows.anew is not None and rows.sorted_indices is not None
    # One selection from both: a mask of whole states takes ten times as long on a CPU.
    count = states[0].shape[1]
    # The gradients of pieces add up in a fixed order: on a GPU index_select would add them as they come, and on a CPU
    # indexing would.
    select = others is None or rows.data.device.type == "cpu"
    if others is None:
        others = [state.new_zeros(state.shape[0], 1, state.shape[2]) for state in states]
        indices = rows.sorted_indices.masked_fill(rows.anew, count)
    else:
        indices = rows.sorted_indices + count * rows.anew
    both = [torch.cat(pair, 1) for pair in zip(states, others, strict=True)]
    return [given.index_select(1, indices) if select else given[:, indices] for given in both]


def _numbered(rows: Rows, marks: Tensor) -> Rows:
    """Rows with the number of the piece that each is of, on a CPU; `marks`: the mask of the rows ``[N]``, or, where all
    sequences run in all steps, ``[T, B]``."""
    pieces, sequence, anew, last = ops.number_pieces(marks, rows.batch_sizes, rows.sequences)
    if anew.shape[0] == rows.sequences and not anew.any():  # nothing is marked
        return rows
    if rows.sorted_indices is not None and rows.unsorted_indices is not None:
        sequence, last = rows.sorted_indices[sequence], last[rows.unsorted_indices]
    return of_pieces(rows, pieces, sequence, last, anew)
