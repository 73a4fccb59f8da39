"""Checks of lengths, cu_seqlens and batch_sizes. What the host sees is checked at once; what only a GPU knows, no call
waits for: that is checked late.

Lengths, cu_seqlens and batch_sizes on a GPU are made to fit there, so that no kernel addresses memory by what does not.
Whether that changed anything is noted on the device and copied into pinned memory, behind the work of the call. The
next call of ours that finds it there raises. What is guaranteed when: docs/design.md.
"""

import ctypes
import os

import torch
from torch import Tensor

from seqkernels._ops import add_op_namespace_prefix, ops
from seqkernels.storage import expect_storage

# The sentences for what does not fit; each has one number in it, which travels with the note.
LENGTHS = "lengths must lie between 0 and the {} steps of the input"
CU_SEQLENS = "cu_seqlens must start at 0, never fall, and end at the number of rows of the input, {}"
BATCH_SIZES = "batch_sizes must not rise, be negative, or exceed the {} sequences of h_0"
PIECES = "pieces are numbers of the {} states of h_0"
ROWS = "batch_sizes add up to more rows than x has, {}"
# As on the CPU: what users give is a wrong value, what an operator is given a wrong argument of a kernel.
SENTENCES: dict[str, type[Exception]] = {
    LENGTHS: ValueError,
    CU_SEQLENS: ValueError,
    BATCH_SIZES: RuntimeError,
    PIECES: RuntimeError,
    ROWS: RuntimeError,
}

_NOTHING = -1


def out_of_sight(values: Tensor) -> bool:
    """Whether the host cannot see the values: reading them would wait for their device."""
    return values.device.type != "cpu"


class _Notes:
    """For each sentence its number, once something did not fit: on a device, and a copy for the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.there = torch.full((len(SENTENCES),), _NOTHING, dtype=torch.int64, device=device)
        self.here = torch.full_like(self.there, _NOTHING, device="cpu", pin_memory=device.type == "cuda")
        self.seen = (ctypes.c_int64 * len(SENTENCES)).from_address(self.here.data_ptr())

    def add(self, misfit: Tensor, sentence: str, number: int) -> None:
        self.there[list(SENTENCES).index(sentence)].masked_fill_(misfit, number)
        self.here.copy_(self.there, non_blocking=True)

    def take(self) -> tuple[str, type[Exception]] | None:
        """The sentence for all notes, and its kind of error; None without notes. The notes are cleared."""
        if max(self.seen) == _NOTHING:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or a copy on its way would say it again
        found = [(s, number) for s, number in zip(SENTENCES, self.seen, strict=True) if number != _NOTHING]
        self.there.fill_(_NOTHING)
        self.here.fill_(_NOTHING)
        return "; ".join(sentence.format(number) for sentence, number in found), SENTENCES[found[0][0]]


_notes: dict[torch.device, _Notes] = {}


def note(misfit: Tensor, sentence: str, number: int, given: Tensor) -> None:
    """Note on the device that what was `given` does not fit, if `misfit`, a bool there, is true; nothing waits for it.

    Raises:
        ValueError, RuntimeError: it does not fit, and SEQKERNELS_CHECK=1 asks to wait for the device.
    """
    device = misfit.device
    capturing = _capturing(device)
    if os.environ.get("SEQKERNELS_CHECK") == "1" and not capturing:
        if misfit:
            raise SENTENCES[sentence](f"{sentence.format(number)}, got {given.tolist()}")
        return
    if device not in _notes:
        if capturing:  # what is allocated now would belong to the graph
            return
        _notes[device] = _Notes(device)
    _notes[device].add(misfit, sentence, number)


def look() -> None:
    """Raise what did not fit in an earlier call, if the device has come so far.

    Raises:
        ValueError, RuntimeError: something did not fit.
    """
    for device, notes in _notes.items():
        found = None if _capturing(device) else notes.take()
        if found:
            sentence, error = found
            raise error(f"{sentence} (seen late; SEQKERNELS_CHECK=1 waits for it in the call itself)")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- lengths and cu_seqlens: operators, so that values are checked when compiled, too; members of torch.vmap in front


def batch_sizes_of(lengths: Tensor, steps: int, rows: int, readable: bool = True) -> tuple[Tensor, int]:
    """How many sequences run in each step ``[T]``, of lengths, which are checked; and how many of the `rows` they use:
    all of them, where lengths are not `readable` or reading them would wait for a device.

    Raises:
        ValueError: lengths that are negative or longer than `steps` (of those on a device: in a later call).
    """
    batch_sizes = ops.batch_sizes(lengths, steps)
    known = readable and not (torch.compiler.is_compiling() or out_of_sight(lengths))
    used = int(batch_sizes.sum()) if known else rows
    mark_fitting(batch_sizes, lengths.shape[0], used)
    return batch_sizes, used


def _check_lengths(lengths: Tensor, steps: int) -> Tensor:
    """Operator: lengths between 0 and `steps`; those on a GPU are made so there."""
    expect_storage(("lengths", lengths))
    look()
    if not out_of_sight(lengths):
        if not (lengths >= 0).logical_and(lengths <= steps).all():
            raise ValueError(f"{LENGTHS.format(steps)}, got {lengths.tolist()}")
        return lengths.clone()
    fitting = lengths.clamp(0, steps)
    note((fitting != lengths).any(), LENGTHS, steps, lengths)
    return fitting


def _batch_sizes(lengths: Tensor, steps: int) -> Tensor:
    """Operator: how many sequences run in each step ``[T]``, of lengths that are checked."""
    lengths = _check_lengths(lengths, steps)
    step = torch.arange(steps, device=lengths.device).expand(*lengths.shape[:-1], steps)
    return lengths.shape[-1] - torch.searchsorted(lengths.sort().values, step.contiguous(), right=True)


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Operator: sequences one after another in all of the rows; those on a GPU are made so there."""
    expect_storage(("cu_seqlens", cu_seqlens))
    look()
    if not out_of_sight(cu_seqlens):
        first, last = cu_seqlens[..., 0], cu_seqlens[..., -1]
        if (first != 0).any() or (last != rows).any() or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"{CU_SEQLENS.format(rows)}, got {cu_seqlens.tolist()}")
        return cu_seqlens.clone()
    fitting = cu_seqlens.clamp(0, rows).cummax(-1).values
    misfits = (fitting != cu_seqlens).any() | (fitting[..., 0] != 0).any() | (fitting[..., -1] != rows).any()
    note(misfits, CU_SEQLENS, rows, cu_seqlens)
    return fitting


_library = torch.library.Library(ops.name, "FRAGMENT")
_library.define("batch_sizes(Tensor lengths, SymInt steps) -> Tensor")
_library.define("check_lengths(Tensor lengths, SymInt steps) -> Tensor")
_library.define("check_cu_seqlens(Tensor cu_seqlens, SymInt rows) -> Tensor")
_library.impl("batch_sizes", _batch_sizes, "CompositeExplicitAutograd")
_library.impl("check_lengths", _check_lengths, "CompositeExplicitAutograd")
_library.impl("check_cu_seqlens", _check_cu_seqlens, "CompositeExplicitAutograd")


@torch.library.register_fake(add_op_namespace_prefix("batch_sizes"), lib=_library)
def _(lengths, steps):
    return lengths.new_empty(*lengths.shape[:-1], steps)


@torch.library.register_fake(add_op_namespace_prefix("check_lengths"), lib=_library)
@torch.library.register_fake(add_op_namespace_prefix("check_cu_seqlens"), lib=_library)
def _(checked, bound):
    return torch.empty_like(checked)


def _register_vmap(name: str) -> None:
    def rule(info, in_dims, values, bound):
        return getattr(ops, name)(values.movedim(in_dims[0], 0), bound), 0

    torch.library.register_vmap(add_op_namespace_prefix(name), rule, lib=_library)


for _name in ("batch_sizes", "check_lengths", "check_cu_seqlens"):
    _register_vmap(_name)


# ---- batch sizes


def fitting(x: Tensor, h_0: Tensor, batch_sizes: Tensor | None) -> Tensor | None:
    """batch_sizes by which no kernel leaves the rows of x or the sequences of h_0. Those on the CPU must fit already.

    Raises:
        ValueError, RuntimeError: what an earlier call was given did not fit.
    """
    if batch_sizes is None or not out_of_sight(batch_sizes):
        return batch_sizes
    known = batch_sizes.dim() == 1 and batch_sizes.dtype == torch.int64 and x.dim() and h_0.dim() == 3
    if not known:
        return batch_sizes  # the operator says what is wrong
    look()
    return _fitting_batch_sizes(batch_sizes, h_0.shape[1], x.shape[0])


def _fitting_batch_sizes(batch_sizes: Tensor, sequences: int, rows: int) -> Tensor:
    """Batch sizes that never rise, and count no more sequences and no more rows than there are."""
    if not len(batch_sizes) or getattr(batch_sizes, "_seqkernels_fit", None) == (sequences, rows):
        return batch_sizes
    falling = batch_sizes.clamp(0, sequences).cummin(0).values
    note((falling != batch_sizes).any(), BATCH_SIZES, sequences, batch_sizes)
    ends = falling.cumsum(0)
    note(ends[-1] > rows, ROWS, rows, batch_sizes)
    return ends.clamp_(max=rows).diff(prepend=ends.new_zeros(1))


def fitting_pieces(pieces: Tensor, states: int) -> Tensor:
    """pieces by which no kernel leaves the states of h_0. Those on the CPU must fit already.

    Raises:
        RuntimeError: there are rows, and no states.
    """
    if not out_of_sight(pieces) or pieces.dtype != torch.int64 or getattr(pieces, "_seqkernels_fit", None) == states:
        return pieces  # of another dtype the operator says what is wrong
    if pieces.numel() and not states:
        raise RuntimeError(PIECES.format(0))
    fitting = pieces.clamp(-1, states - 1)
    note((fitting != pieces).any(), PIECES, states, pieces)
    return fitting.clamp_(min=0)  # -1 is that of rows behind the last step


def fitting_backward(
    x: Tensor, h_0: Tensor, batch_sizes: Tensor | None, wants_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """x for the products that give the gradients of weights, and batch_sizes as `fitting` gives them.

    Rows that no step uses may hold what is not finite. Where the host does not know which these are, they are zeros in
    the x that is returned; in what `varlen` made they are zeros already.
    """
    batch_sizes = fitting(x, h_0, batch_sizes)
    if not wants_weights or batch_sizes is None or not out_of_sight(batch_sizes):
        return x, batch_sizes
    if hasattr(batch_sizes, "_seqkernels_fit"):
        return x, batch_sizes
    row = torch.arange(x.shape[0], device=x.device)
    return x.masked_fill((row >= batch_sizes.sum()).unsqueeze(1), 0), batch_sizes


def mark_fitting_pieces(pieces: Tensor, states: int) -> None:
    """Pieces that were numbered here need not be looked into again."""
    if not torch.compiler.is_compiling():
        pieces._seqkernels_fit = states  # type: ignore[attr-defined]


def mark_fitting(batch_sizes: Tensor, sequences: int, rows: int) -> None:
    """Batch sizes that were made from lengths which fit need not be looked into again."""
    if type(batch_sizes) is Tensor and not torch.compiler.is_compiling():
        batch_sizes._seqkernels_fit = sequences, rows  # type: ignore[attr-defined]
