"""Where masks cut sequences: their pieces as the sequences of a ragged batch, which every backend runs; or, where rows
stay, the number of the piece that each row is of. `seqkernels.resets` says which of both a call gets.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import late_checks, modes, varlen
from seqkernels._ops import ops
from seqkernels.gather import gather_rows
from seqkernels.varlen import Rows


def marks_nothing(mask: Tensor) -> bool:
    """Whether that is known without waiting for a GPU."""
    return not late_checks.out_of_sight(mask) and may_read(mask) and not mask.any()


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


def numbered(input: Tensor | PackedSequence, mask: Tensor, batch_first: bool, rows: Rows) -> Rows:
    """`rows` of an input, which they are without resets, with the number of the piece that each is of, on any device.
    Where nobody may ask how many pieces there are, there are as many as rows and sequences."""
    device = mask.device
    if isinstance(input, PackedSequence):
        places = _places_of_packed(input, rows.sequences, device)
    else:
        steps, sequences = time_major(mask, batch_first).shape
        mask = time_major(mask, batch_first).reshape(-1)
        of_each = torch.arange(sequences * (steps + 1), device=device).view(sequences, steps + 1)
        places = of_each[:, :steps].t().reshape(-1), of_each[:, 0], of_each[:, 0] + steps
    place, begins, ends = places
    cuts = _cuts_of(mask, place, begins)
    count = cuts.begin.shape[0]
    found = cuts.piece[place], cuts.sequence, cuts.piece[ends], F.pad(cuts.marks, (0, 1))[cuts.begin]
    pieces, sequence, last, anew = (_queued(t, rows.data.device) for t in found)
    if rows.batch_sizes is None:
        pieces = pieces.view(steps, sequences)
    late_checks.mark_fitting_pieces(pieces, count)
    if rows.sorted_indices is not None and rows.unsorted_indices is not None:
        sequence, last = rows.sorted_indices[sequence], last[rows.unsorted_indices]
    return of_pieces(rows, pieces, sequence, last, anew)


def of_pieces(rows: Rows, pieces: Tensor, sequence: Tensor, last: Tensor, anew: Tensor) -> Rows:
    data, batch_sizes, *_, restore_layout, _, _ = rows  # faster than _replace
    return Rows(data, batch_sizes, anew.shape[0], sequence, last, restore_layout, anew, pieces)


def time_major(mask: Tensor, batch_first: bool) -> Tensor:
    """The mask ``[T, B]`` of padded sequences, or of an unbatched one."""
    return mask.unsqueeze(1) if mask.dim() == 1 else mask.t() if batch_first else mask


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
        known = not (out_of_sight or torch.compiler.is_compiling() or modes.has_members(of_each, "a list of lengths"))
        used = int(of_each.sum()) if known else used
        length = _queued(of_each, reset.device)
    place = torch.arange(sequences * (steps + 1), device=reset.device).view(sequences, steps + 1)
    begins, of_steps = place[:, 0], place[:, :steps]
    place = (of_steps if batch_first else of_steps.t()).reshape(-1)
    ends = begins + length
    data = input.reshape(steps * sequences, input.shape[2])
    rows = _rows(data, reset.reshape(steps * sequences), place, begins, ends, steps, used, lengths is None, transformed)

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


class Cuts(NamedTuple):
    """Where the pieces C of sequences begin, at which places."""

    marks: Tensor  # of places: whether it is marked
    piece: Tensor  # of places
    begin: Tensor  # [C]
    sequence: Tensor  # [C] that it is of
    readable: bool  # whether C is the number of pieces, and not that of places, of which the last begin behind all


def _cuts_of(reset: Tensor, place: Tensor, begins: Tensor) -> Cuts:
    """Arguments as those of `_rows`."""
    places, begins = reset.shape[0] + begins.shape[0], begins.contiguous()  # of others searchsorted warns
    marks = reset.new_zeros(places).scatter(0, place, reset)
    starts = marks.index_fill(0, begins, 1)  # torch.jit.trace has none by True
    piece = starts.cumsum(0) - 1
    readable = may_read(starts)
    begin = _places_of(starts, piece, readable)
    return Cuts(marks, piece, begin, torch.searchsorted(begins, begin, right=True) - 1, readable)


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
    marks, piece, begin, sequence, readable = _cuts_of(reset, place, begins)
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


def may_read(marks: Tensor) -> bool:
    """Whether the number of marks may be asked for, which waits for a GPU that has them.

    Raises:
        RuntimeError: masks of members of torch.vmap, within another transform.
    """
    if torch.compiler.is_compiling() or (marks.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not modes.has_members(marks, "a mask")
