"""Brings sequences in every layout that users have into rows in PackedSequence order, and results back.

Rows are grouped by step, longest sequences first, `batch_sizes[t]` of them in step t. A padded time-major batch is the
case of a constant batch size and costs no copy. Sequences given by `lengths` or `cu_seqlens` are sorted here.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import late_checks, modes
from seqkernels._ops import ops
from seqkernels.gather import gather_rows


class Rows(NamedTuple):
    """Sequences as rows, and the way back to the user's layout."""

    data: Tensor  # [N, I]
    batch_sizes: Tensor | None  # [T]; None: all sequences run in every step
    sequences: int  # B
    sorted_indices: Tensor | None  # [B] sequence at each place of the sorted batch; None: not sorted
    unsorted_indices: Tensor | None  # [B] its inverse
    restore_layout: Callable[[Tensor], Tensor | PackedSequence]  # y [N, *] -> the user's layout
    # Of pieces that resets have cut (`seqkernels.resets`), which are the sequences then: [B] whether one begins anew.
    # sorted_indices are the sequences that they are of, unsorted_indices the last piece of each of those.
    anew: Tensor | None = None
    # [N] which of the pieces each row is of, where they follow each other in the rows of their sequence; None: the
    # pieces are those of a ragged batch.
    pieces: Tensor | None = None


def rows_of(
    input: Tensor | PackedSequence,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    sequences: int | None,
    transformed: bool,
) -> Rows:
    """An input in any layout, checked by `seqkernels.checks.check_call`; `sequences`: as of `from_packed`.

    Raises:
        TypeError, ValueError, RuntimeError: as the functions below.
    """
    if isinstance(input, PackedSequence):
        return from_packed(input, sequences)
    if cu_seqlens is not None:
        return from_cu_seqlens(input, cu_seqlens, max_seqlen, transformed)
    if lengths is not None:
        return from_lengths(input, lengths, batch_first, transformed)
    if input.is_nested:
        return from_nested(input, transformed)
    return from_unbatched(input) if input.dim() == 2 else from_padded(input, batch_first)


def from_padded(input: Tensor, batch_first: bool) -> Rows:
    """input ``[T, B, I]`` or, with batch_first, ``[B, T, I]``.

    Raises:
        RuntimeError: torch.nn's own for T = 0 (with `lengths` or `cu_seqlens`, that is a batch of empty sequences).
    """
    time_major = input.transpose(0, 1) if batch_first else input
    steps, sequences, features = time_major.shape
    check_steps(steps)

    def restore_layout(y: Tensor) -> Tensor:
        y = y.view(steps, sequences, y.shape[1])
        return y.transpose(0, 1) if batch_first else y

    return Rows(time_major.reshape(steps * sequences, features), None, sequences, None, None, restore_layout)


def from_unbatched(input: Tensor) -> Rows:
    """input ``[T, I]``, one sequence.

    Raises:
        RuntimeError: as `from_padded`.
    """
    check_steps(input.shape[0])
    return Rows(input, None, 1, None, None, lambda y: y)


def from_packed(input: PackedSequence, sequences: int | None) -> Rows:
    """A PackedSequence. `sequences` is the batch size of the given initial state, None without one.

    Raises:
        ValueError: batch_sizes, sorted_indices and data that do not fit together.
    """
    data, batch_sizes, sorted_indices, unsorted_indices = input
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check_packed(input)
    exporting = torch.compiler.is_exporting()  # where int() would ask for a number
    first: int = batch_sizes[0].item() if exporting else int(batch_sizes[0])  # type: ignore[assignment]
    if compiling:
        torch._check(first >= 0)
        # Prefer a size the compiler knows to one it must read from batch_sizes.
        if sorted_indices is not None:
            sequences = sorted_indices.shape[0]
        if sequences is not None:
            torch._check(first == sequences, lambda: "batch_sizes[0] is not the batch size")
            first = sequences

    def restore_layout(y: Tensor) -> PackedSequence:
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)

    return Rows(data, batch_sizes, first, sorted_indices, unsorted_indices, restore_layout)


def from_lengths(input: Tensor, lengths: Tensor | Sequence[int], batch_first: bool, transformed: bool = False) -> Rows:
    """input ``[T, B, I]`` or, with batch_first, ``[B, T, I]``; sequence b is its first lengths[b] steps.

    What lies behind a sequence's end is not read, and comes out as zeros. Lengths may be on any device, in any order,
    and zero. Where they are on the CPU, the work is in proportion to their sum; elsewhere nothing waits for the device.
    `transformed`: a torch.func transform is at work, so plain operations are called where there is an operator.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: lengths of the wrong shape, negative, or longer than T (of those on a device: in a later call).
    """
    steps, sequences = steps_and_sequences(input, batch_first)
    lengths = as_lengths(lengths, sequences, input.device)
    total = steps * sequences
    readable = not modes.has_members(lengths, "a list of lengths")
    batch_sizes, used = late_checks.batch_sizes_of(lengths, steps, total, readable)
    sorted_indices = lengths.argsort(descending=True, stable=True)
    step_stride, sequence_stride = (1, steps) if batch_first else (sequences, 1)
    index, inverse = row_index(batch_sizes, sorted_indices * sequence_stride, step_stride, used, total)
    index, inverse = index.to(input.device), inverse.to(input.device)
    data = gather_rows(input.reshape(total, input.shape[2]), index, inverse, transformed)

    def restore_layout(y: Tensor) -> Tensor:
        return gather_rows(y, inverse, index, transformed).view(*input.shape[:2], y.shape[1])

    return _sorted(data, batch_sizes, sequences, sorted_indices, restore_layout)


def from_cu_seqlens(input: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, transformed: bool = False) -> Rows:
    """input ``[N, I]``, sequences one after another; sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    `max_seqlen` bounds the longest sequence, as N does; it is read from cu_seqlens if None.

    Raises:
        TypeError: cu_seqlens that are not integers.
        ValueError: cu_seqlens that do not start at 0, fall, or do not end at N; a longer sequence than max_seqlen (of
            those on a device: in a later call).
    """
    cu_seqlens, steps = checked_cu_seqlens(input, cu_seqlens, max_seqlen)
    lengths, total, sequences = cu_seqlens.diff(), input.shape[0], cu_seqlens.shape[0] - 1
    readable = not modes.has_members(lengths, "a list of lengths")
    batch_sizes, _ = late_checks.batch_sizes_of(lengths, steps, total, readable)
    sorted_indices = lengths.argsort(descending=True, stable=True)
    index, inverse = row_index(batch_sizes, cu_seqlens[:-1][sorted_indices], 1, total, total)
    index, inverse = index.to(input.device), inverse.to(input.device)
    data = gather_rows(input, index, inverse, transformed)

    def restore_layout(y: Tensor) -> Tensor:
        return gather_rows(y, inverse, index, transformed)

    return _sorted(data, batch_sizes, sequences, sorted_indices, restore_layout)


def checked_cu_seqlens(input: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> tuple[Tensor, int]:
    """cu_seqlens that fit the input ``[N, I]``, and how many steps the longest sequence has at most."""
    if input.dim() != 2:
        raise ValueError(f"with cu_seqlens the input is [rows, features], got {input.dim()} dimensions")
    cu_seqlens = _integers(cu_seqlens, "cu_seqlens")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens is [sequences + 1], got the shape {list(cu_seqlens.shape)}")
    total = input.shape[0]
    cu_seqlens = ops.check_cu_seqlens(cu_seqlens, total)
    if not (max_seqlen is None or isinstance(max_seqlen, (numbers.Integral, torch.SymInt, Tensor))):
        raise TypeError(f"max_seqlen is a number of steps, got {max_seqlen!r}")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    return cu_seqlens, min(max_seqlen, total)


def check_steps(steps: int) -> None:
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def steps_and_sequences(input: Tensor, batch_first: bool) -> tuple[int, int]:
    return (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])


def _sorted(data: Tensor, batch_sizes: Tensor, sequences: int, sorted_indices: Tensor, restore_layout) -> Rows:
    sorted_indices = sorted_indices.to(data.device)
    return Rows(data, batch_sizes, sequences, sorted_indices, sorted_indices.argsort(), restore_layout)


def from_nested(input: Tensor, transformed: bool = False, from_values: Callable[..., Rows] = from_cu_seqlens) -> Rows:
    """A nested tensor of the jagged layout, ``[B, T of each, I]``; so is what comes back.

    Its values are rows one sequence after another, as with cu_seqlens: nothing is padded.
    """
    input = input.contiguous()  # closes gaps between sequences, where there are any
    offsets, longest = input.offsets(), input._maybe_max_seqlen  # type: ignore[attr-defined]
    if longest is None and torch.compiler.is_compiling():
        longest = input.values().shape[0]  # what is known without reading offsets
    rows = from_values(input.values(), offsets, longest, transformed)
    extremes = input._maybe_min_seqlen, input._maybe_max_seqlen  # type: ignore[attr-defined]

    def restore_layout(y: Tensor) -> Tensor:
        values = rows.restore_layout(y)
        assert isinstance(values, Tensor)
        return torch.nested.nested_tensor_from_jagged(values, offsets, min_seqlen=extremes[0], max_seqlen=extremes[1])

    return rows._replace(restore_layout=restore_layout)


def row_index(batch_sizes: Tensor, first_rows: Tensor, stride: int, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Where each of the `rows` packed rows lies among the user's `total` rows, and the inverse; -1 where nowhere.

    first_rows: ``[B]`` where each sequence of the sorted batch begins there; its steps are `stride` rows apart.
    Nothing here has the size of steps times sequences, nor one that depends on data, so that it compiles.
    """
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows, device=batch_sizes.device)
    # Rows behind the last step go nowhere; there are some where the host does not know how many are used.
    step = torch.searchsorted(ends, row, right=True).clamp(max=batch_sizes.shape[0] - 1)
    place = (row - (ends - batch_sizes)[step]).clamp(max=first_rows.shape[0] - 1)
    used = row < batch_sizes.sum()
    index = torch.where(used, first_rows[place] + step * stride, -1)
    inverse = row.new_full((total + 1,), -1).scatter(0, torch.where(used, index, total), row)[:total]
    return index, inverse


def as_lengths(lengths: Tensor | Sequence[int], sequences: int, device: torch.device) -> Tensor:
    lengths = _integers(lengths, "lengths")
    if lengths.dim() != 1 or lengths.shape[0] != sequences:
        raise ValueError(f"lengths is [{sequences}], one for each sequence, got the shape {list(lengths.shape)}")
    # Lengths on the CPU serve every device; others must be where the input is.
    return lengths if lengths.device.type == "cpu" else lengths.to(device)


def _integers(values: Tensor | Sequence[int], name: str) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values) if len(values) else torch.zeros(0, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            if torch.compiler.is_compiling():
                raise  # of numbers that a compiler does not know
            raise TypeError(f"{name} must be a Tensor or a list of 64-bit integers, got {values!r}") from error
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values.long()


def _check_packed(packed: PackedSequence) -> None:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if batch_sizes.dim() != 1 or len(batch_sizes) == 0:
        raise ValueError(f"batch_sizes is [steps] with at least one step, got the shape {list(batch_sizes.shape)}")
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype != torch.int64:
        raise ValueError(f"batch_sizes must be int64 on the CPU, got {batch_sizes.dtype} on {batch_sizes.device}")
    if int(batch_sizes[-1]) < 0 or bool((batch_sizes[1:] > batch_sizes[:-1]).any()):
        raise ValueError("batch_sizes must not rise nor be negative: the sequences are sorted by falling length")
    if int(batch_sizes.sum()) != len(data):
        raise ValueError(f"batch_sizes add up to {int(batch_sizes.sum())} rows, but data has {len(data)}")
    for name, indices in (("sorted_indices", sorted_indices), ("unsorted_indices", unsorted_indices)):
        if indices is not None and indices.shape != (int(batch_sizes[0]),):
            raise ValueError(
                f"{name} is [{int(batch_sizes[0])}], one for each sequence, got the shape {list(indices.shape)}"
            )
