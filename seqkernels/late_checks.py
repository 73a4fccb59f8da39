"""Checks of values that only the device knows, which a call does not wait for.

Lengths, cu_seqlens and batch_sizes on a GPU are made to fit there, so that no kernel addresses memory by what does not.
Whether that changed anything is noted on the device and copied into pinned memory, behind the work of the call. The
next call of ours that finds it there raises. What is guaranteed when: docs/design.md.
"""

import ctypes
import os

import torch
from torch import Tensor

# The sentences for what does not fit; each has one number in it, which travels with the note.
LENGTHS = "lengths must lie between 0 and the {} steps of the input"
CU_SEQLENS = "cu_seqlens must start at 0, never fall, and end at the number of rows of the input, {}"
BATCH_SIZES = "batch_sizes must not rise, be negative, or exceed the {} sequences of h_0"
ROWS = "batch_sizes add up to more rows than x has, {}"
# As on the CPU: what users give is a wrong value, what an operator is given a wrong argument of a kernel.
SENTENCES: dict[str, type[Exception]] = {
    LENGTHS: ValueError,
    CU_SEQLENS: ValueError,
    BATCH_SIZES: RuntimeError,
    ROWS: RuntimeError,
}

_NOTHING = -1


def out_of_sight(values: Tensor) -> bool:
    """Whether reading the values would wait for their device."""
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
        """What there is to say, and how; afterwards there is nothing."""
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
    """`misfit`, a bool on the device, says whether the sentence must be said of what was given; nothing waits for it.

    Raises:
        ValueError, RuntimeError: it must, and SEQKERNELS_CHECK=1 asks to wait for the device.
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
    """Say what did not fit in an earlier call, as far as devices have come.

    Raises:
        ValueError, RuntimeError: something did not.
    """
    for device, notes in _notes.items():
        found = None if _capturing(device) else notes.take()
        if found:
            sentence, error = found
            raise error(f"{sentence} (seen late; SEQKERNELS_CHECK=1 waits for it in the call itself)")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- what is made to fit


def fitting_lengths(lengths: Tensor, steps: int) -> Tensor:
    """Lengths between 0 and `steps`."""
    fitting = lengths.clamp(0, steps)
    note((fitting != lengths).any(), LENGTHS, steps, lengths)
    return fitting


def fitting_cu_seqlens(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Sequences one after another that lie within the rows."""
    fitting = cu_seqlens.clamp(0, rows).cummax(0).values
    fits = (fitting == cu_seqlens).all().logical_and(fitting[0] == 0).logical_and(fitting[-1] == rows)
    note(fits.logical_not(), CU_SEQLENS, rows, cu_seqlens)
    return fitting


def fitting_batch_sizes(batch_sizes: Tensor, sequences: int, rows: int) -> Tensor:
    """Batch sizes that never rise, and count no more sequences and no more rows than there are."""
    if not len(batch_sizes) or getattr(batch_sizes, "_seqkernels_fit", None) == (sequences, rows):
        return batch_sizes
    falling = batch_sizes.clamp(0, sequences).cummin(0).values
    note((falling != batch_sizes).any(), BATCH_SIZES, sequences, batch_sizes)
    ends = falling.cumsum(0)
    note(ends[-1] > rows, ROWS, rows, batch_sizes)
    return ends.clamp_(max=rows).diff(prepend=ends.new_zeros(1))


def is_marked(batch_sizes: Tensor) -> bool:
    return hasattr(batch_sizes, "_seqkernels_fit")


def mark_fitting(batch_sizes: Tensor, sequences: int, rows: int) -> None:
    """Batch sizes that were made from lengths which fit need not be looked into again."""
    if type(batch_sizes) is Tensor and not torch.compiler.is_compiling():
        batch_sizes._seqkernels_fit = sequences, rows  # type: ignore[attr-defined]
