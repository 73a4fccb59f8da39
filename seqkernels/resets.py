"""Resets inside of sequences: the state before each step that a mask marks begins anew.

Sequences are cut before marked steps, and each piece has a first and a last state of its own. The CPU's kernels, and
some of those for GPUs, go from one piece to the next, and rows stay where they are. For others the pieces run side by
side as those of a ragged batch: so every backend has resets, forward and backward, but what runs in a step is more than
without them.

Where nobody may read the mask (compiled code, a CUDA graph that is captured, torch.vmap over masks) there are as many
pieces as there could be, one for each row, and most of them are empty. Where rows stay, these are states alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import hardware, late_checks, modes, select, varlen
from seqkernels._ops import ops
from seqkernels.backends.call import RESETS, Call
from seqkernels.gather import gather_rows
from seqkernels.hardware import THIS_MACHINE
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


def marks_nothing(mask: Tensor) -> bool:
    """Whether that is known without waiting for a GPU."""
    return not late_checks.out_of_sight(mask) and _readable(mask) and not mask.any()


def cut(
    input: Tensor | PackedSequence,
    mask: Tensor,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    sequences: int | None,
    transformed: bool,
) -> Rows:
    """The pieces of sequences in any layout as rows, and the way back.

    `sequences`: the batch size of the given initial state, None without one.

    Raises:
        TypeError, ValueError, RuntimeError: as `seqkernels.varlen`.
    """
    if isinstance(input, PackedSequence):
        return _from_packed(input, varlen.from_packed(input, sequences), mask, transformed)
    if input.is_nested:
        return varlen.from_nested(input, transformed, functools.partial(_from_cu_seqlens, mask))
    if cu_seqlens is not None:
        return _from_cu_seqlens(mask, input, cu_seqlens, max_seqlen, transformed)
    if input.dim() == 2:
        rows = _from_padded(input.unsqueeze(0), mask.unsqueeze(0), True, None, transformed)
        return rows._replace(restore_layout=lambda y: rows.restore_layout(y).squeeze(0))  # type: ignore[union-attr]
    return _from_padded(input, mask, batch_first, lengths, transformed)


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
    """As `cut`, but of sequences whose rows stay where they are without resets."""

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


def time_major(mask: Tensor, batch_first: bool) -> Tensor:
    """The mask ``[T, B]`` of padded sequences, or of an unbatched one."""
    return mask.unsqueeze(1) if mask.dim() == 1 else mask.t() if batch_first else mask


def numbered(input: Tensor | PackedSequence, mask: Tensor, batch_first: bool, rows: Rows) -> Rows:
    """The same of `rows_lie` on any device, `rows` being theirs without resets. Where nobody may ask how many pieces
    there are, there are as many as rows and sequences."""
    device = mask.device
    if isinstance(input, PackedSequence):
        places = _places_of_packed(input, rows.sequences, device)
    else:
        steps, sequences = time_major(mask, batch_first).shape
        mask = time_major(mask, batch_first).reshape(-1)
        of_each = torch.arange(sequences * (steps + 1), device=device).view(sequences, steps + 1)
        places = of_each[:, :steps].t().reshape(-1), of_each[:, 0], of_each[:, 0] + steps
    place, begins, ends = places
    cuts = _cuts(mask, place, begins)
    count = cuts.begin.shape[0]
    found = cuts.piece[place], cuts.sequence, cuts.piece[ends], F.pad(cuts.marks, (0, 1))[cuts.begin]
    pieces, sequence, last, anew = (_queued(t, rows.data.device) for t in found)
    if rows.batch_sizes is None:
        pieces = pieces.view(steps, sequences)
    late_checks.mark_fitting_pieces(pieces, count)
    if rows.sorted_indices is not None and rows.unsorted_indices is not None:
        sequence, last = rows.sorted_indices[sequence], last[rows.unsorted_indices]
    return _of_pieces(rows, pieces, sequence, last, anew)


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


# ---- layouts: where the rows of the input are if sequences lie one after another, each with a spare place behind it,
# so that empty ones have a place as well


def _from_padded(
    input: Tensor, reset: Tensor, batch_first: bool, lengths: Tensor | Sequence[int] | None, transformed: bool
) -> Rows:
    steps, sequences = varlen.steps_and_sequences(input, batch_first)
    used = steps * sequences
    length: int | Tensor = steps
    if lengths is None:
        varlen.check_steps(steps)
    else:
        of_each = ops.check_lengths(varlen.as_lengths(lengths, sequences, input.device), steps)
        out_of_sight = late_checks.out_of_sight(of_each)
        reset = _queued(reset, of_each.device) if out_of_sight else reset
        used = used if out_of_sight or torch.compiler.is_compiling() else int(of_each.sum())
        length = _queued(of_each, reset.device)
    place = torch.arange(sequences * (steps + 1), device=reset.device).view(sequences, steps + 1)
    begins, of_steps = place[:, 0], place[:, :steps]
    place = (of_steps if batch_first else of_steps.t()).reshape(-1)
    ends = begins + length
    data = input.reshape(steps * sequences, input.shape[2])
    rows = _rows(data, reset.reshape(-1), place, begins, ends, steps, used, lengths is None, transformed)

    def restore_layout(y: Tensor) -> Tensor:
        return rows.restore_layout(y).view(*input.shape[:2], y.shape[1])  # type: ignore[union-attr]

    return rows._replace(restore_layout=restore_layout)


def _from_cu_seqlens(
    reset: Tensor, input: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, transformed: bool
) -> Rows:
    cu_seqlens, steps = varlen.checked_cu_seqlens(input, cu_seqlens, max_seqlen)
    lengths = ops.check_lengths(cu_seqlens.diff(), steps)
    reset = _queued(reset, cu_seqlens.device) if late_checks.out_of_sight(cu_seqlens) else reset
    cu_seqlens, lengths = _queued(cu_seqlens, reset.device), _queued(lengths, reset.device)
    begins = cu_seqlens[:-1] + torch.arange(lengths.shape[0], device=reset.device)
    row = torch.arange(reset.shape[0], device=reset.device)
    place = row + torch.searchsorted(cu_seqlens[1:], row, right=True)
    return _rows(input, reset, place, begins, begins + lengths, steps, reset.shape[0], False, transformed)


def _places_of_packed(input: PackedSequence, sequences: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """place, begins and ends, as `_rows` takes them."""
    batch_sizes = _queued(input.batch_sizes, device)
    row, sequence = (torch.arange(count, device=device) for count in (input.data.shape[0], sequences))
    lengths = batch_sizes.shape[0] - torch.searchsorted(batch_sizes.flip(0), sequence, right=True)
    ends = (lengths + 1).cumsum(0) - 1
    begins, of_steps = ends - lengths, batch_sizes.cumsum(0)
    step = torch.searchsorted(of_steps, row, right=True)
    return begins[row - (of_steps - batch_sizes)[step]] + step, begins, ends


def _from_packed(input: PackedSequence, rows: Rows, reset: Tensor, transformed: bool) -> Rows:
    places, steps = _places_of_packed(input, rows.sequences, reset.device), input.batch_sizes.shape[0]
    cut = _rows(input.data, reset, *places, steps, reset.shape[0], True, transformed)
    indices, back = cut.sorted_indices, cut.unsorted_indices
    if rows.sorted_indices is not None:  # states are in the user's order of sequences
        indices, back = rows.sorted_indices[indices], back[rows.unsorted_indices]  # type: ignore[index]

    def restore_layout(y: Tensor) -> PackedSequence:
        return rows.restore_layout(cut.restore_layout(y))  # type: ignore[arg-type, return-value]

    return cut._replace(sorted_indices=indices, unsorted_indices=back, restore_layout=restore_layout)


# ---- pieces


class _Cuts(NamedTuple):
    """Where the pieces C of sequences begin, at which places."""

    marks: Tensor  # of places: whether it is marked
    piece: Tensor  # of places
    begin: Tensor  # [C]
    sequence: Tensor  # [C] that it is of
    readable: bool  # whether C is the number of pieces, and not that of places, of which the last begin behind all


def _cuts(reset: Tensor, place: Tensor, begins: Tensor) -> _Cuts:
    """Arguments as those of `_rows`."""
    places, begins = reset.shape[0] + begins.shape[0], begins.contiguous()  # of others searchsorted warns
    marks = reset.new_zeros(places).scatter(0, place, reset)
    starts = marks.index_fill(0, begins, 1)  # torch.jit.trace has none by True
    piece = starts.cumsum(0) - 1
    readable = _readable(starts)
    begin = _places_of(starts, piece, readable)
    return _Cuts(marks, piece, begin, torch.searchsorted(begins, begin, right=True) - 1, readable)


def _numbered(rows: Rows, marks: Tensor) -> Rows:
    """Rows with the number of the piece that each is of, on a CPU; `marks`: the mask of the rows ``[N]``, or, where all
    sequences run in all steps, ``[T, B]``."""
    pieces, sequence, anew, last = ops.number_pieces(marks, rows.batch_sizes, rows.sequences)
    if anew.shape[0] == rows.sequences and not anew.any():  # nothing is marked
        return rows
    if rows.sorted_indices is not None and rows.unsorted_indices is not None:
        sequence, last = rows.sorted_indices[sequence], last[rows.unsorted_indices]
    return _of_pieces(rows, pieces, sequence, last, anew)


def _of_pieces(rows: Rows, pieces: Tensor, sequence: Tensor, last: Tensor, anew: Tensor) -> Rows:
    data, batch_sizes, *_, restore_layout, _, _ = rows  # faster than _replace
    return Rows(data, batch_sizes, anew.shape[0], sequence, last, restore_layout, anew, pieces)


def _rows(
    input: Tensor,  # [M, I]
    reset: Tensor,  # [M]
    place: Tensor,  # [M] where each row is: between sequences if it is not used
    begins: Tensor,  # [B] places at which sequences begin
    ends: Tensor,  # [B] the first places behind them
    steps: int,  # of the longest sequence, at most
    used: int,  # rows, at most
    all_used: bool,
    transformed: bool,
) -> Rows:
    """The pieces C of the sequences as rows, and the way back to the input's."""
    total, places, device = reset.shape[0], reset.shape[0] + begins.shape[0], reset.device
    begins, place = begins.contiguous(), place.contiguous()
    if not all_used:
        reset = reset & (place < ends[torch.searchsorted(begins, place, right=True) - 1])
    marks, piece, begin, sequence, readable = _cuts(reset, place, begins)
    behind = begin.new_full((1,), places)
    lengths = (torch.minimum(torch.cat([begin[1:], behind]), ends[sequence]) - begin).clamp(min=0)
    lengths, order = lengths.sort(descending=True, stable=True)
    if readable and lengths.shape[0] and not late_checks.out_of_sight(lengths):
        steps = int(lengths[0])
    rank = order.argsort()
    begin_of, count = begin[order], begin.shape[0]
    ended = torch.searchsorted(lengths.flip(0), torch.arange(max(steps, 1), device=device), right=True)
    batch_sizes = count - ended
    of_row = rank[piece[place]]
    step = place - begin_of[of_row]
    # A row that is not used, behind the end of the last piece of its sequence, goes nowhere.
    inside = step if all_used else step.clamp(max=batch_sizes.shape[0] - 1)
    inverse = (batch_sizes.cumsum(0) - batch_sizes)[inside] + of_row
    inverse = inverse if all_used else torch.where(step < lengths[of_row], inverse, -1)
    to = inverse if all_used else torch.where(inverse < 0, used, inverse)
    index = inverse.new_full((used + 1,), -1).scatter(0, to, torch.arange(total, device=device))[:used]
    late_checks.mark_fitting(batch_sizes, count, used)
    index, inverse = _queued(index, input.device), _queued(inverse, input.device)
    return Rows(
        data=gather_rows(input, index, inverse, transformed),
        batch_sizes=batch_sizes,
        sequences=count,
        sorted_indices=_queued(sequence[order], input.device),
        unsorted_indices=_queued(rank[piece[ends]], input.device),
        restore_layout=lambda y: gather_rows(y, inverse, index, transformed),
        anew=_queued(F.pad(marks, (0, 1))[begin_of], input.device),
    )


def _queued(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; the host does not wait for a GPU to get it."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def _places_of(starts: Tensor, piece: Tensor, readable: bool) -> Tensor:
    """Where pieces begin; where nobody may ask how many there are, as many as places, of which the last are empty and
    lie behind all."""
    if readable:
        return starts.nonzero().squeeze(1)
    places = starts.shape[0]
    found = piece.new_full((places + 1,), places)
    return found.scatter(0, torch.where(starts, piece, places), torch.arange(places, device=starts.device))[:places]


def _readable(marks: Tensor) -> bool:
    """Whether the number of marks may be asked for, which waits for a GPU that has them.

    Raises:
        RuntimeError: masks of members of torch.vmap, within another transform.
    """
    if torch.compiler.is_compiling() or (marks.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(marks):
        if torch._C._functorch.is_batchedtensor(marks):
            if not modes.only_vmap():
                raise RuntimeError(
                    "a mask of its own for each member of torch.vmap goes with no other transform of torch.func: take "
                    "gradients by backward() outside of vmap"
                )
            return False
        marks = torch._C._functorch.get_unwrapped(marks)
    return True
