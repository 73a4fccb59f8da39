"""The shapes that are measured, by name; the same names stand in tests, result rows and docs/benchmarks.md."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import InputError, data, require


class Problem(NamedTuple):
    """T steps, B sequences, I input size, H hidden size, layers, and how long packed sequences are: evenly spread from
    shortest * T to T, or drawn from the data of a lecture task."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    shortest: float = 1 / 3
    lengths_of: str | None = None


PROBLEMS = {
    "step": Problem(1, 1, 128, 256),
    "names": Problem(20, 64, 100, 100),
    "names256": Problem(20, 256, 100, 100),
    "news": Problem(50, 32, 100, 128),
    "charlm": Problem(200, 32, 128, 256),
    "charlm1": Problem(200, 1, 128, 512),
    "big": Problem(64, 64, 512, 512),
    "big1024": Problem(64, 16, 1024, 1024),
    "chunk": Problem(8, 16, 512, 512),  # of a stream
    "chunk1024": Problem(8, 16, 1024, 1024),
    "decoder": Problem(1, 16, 512, 512),  # one step by hand, as a decoder takes it
    "names-real": Problem(20, 64, 100, 100, lengths_of="names"),
    "news-real": Problem(100, 32, 100, 128, lengths_of="news"),
    "cliff129": Problem(1000, 16, 64, 129),
    "cliff192": Problem(1000, 16, 64, 192),
    "cliff256": Problem(1000, 16, 64, 256),
    "flashrnn": Problem(1024, 16, 768, 768),
    "long": Problem(4000, 16, 64, 128),
    "kernelbench": Problem(512, 10, 128, 256, layers=6),
}
# What a run without --problem measures: all that a CPU is through with in seconds; and fewer for a first look.
USUAL = ("step", "names", "names256", "news", "charlm", "charlm1", "big", "big1024")
QUICK = ("step", "names", "news")
CELLS = ("GRU", "LSTM", "RNN")


def operator_cell(name: str) -> str:
    """What seqkernels' operators call the cell of a module."""
    return "rnn_tanh" if name == "RNN" else name.lower()


def gates_of(name: str) -> int:
    # Imported here: a worker says first which seqkernels it measures (timing.serve).
    return require("seqkernels.backends.cells").CELLS[operator_cell(name)].gates


def lengths(problem: Problem) -> Tensor:
    """``[B]`` lengths of a packed batch, the longest T, in no order: evenly spread, or drawn from data.

    Raises:
        InputError: the task's data is not at hand.
    """
    if problem.lengths_of:
        drawn = task_lengths(problem.lengths_of).clamp(1, problem.T)
        drawn = drawn[torch.randint(len(drawn), (problem.B,), generator=torch.Generator().manual_seed(0))]
    else:
        drawn = torch.linspace(problem.shortest * problem.T, problem.T, problem.B).round().long().clamp(min=1)
    drawn[-1] = problem.T
    return drawn[torch.randperm(problem.B, generator=torch.Generator().manual_seed(0))]


@functools.cache
def task_lengths(task: str) -> Tensor:
    """How long the training sequences of a lecture task are: names in letters, news in tokens."""
    folder = data.data_folder(None)
    if folder is None:
        raise InputError(f"the lengths of {task} need its data: {data.VARIABLE} names no folder.")
    if task == "names":
        counts = [len(name) for name, _ in data.read_names(data.names_files(folder)[0])]
    else:
        counts = [len(data.tokens(text)) for text, _ in data.read_news(data.news_files(folder)[0])]
    return torch.tensor(counts)


def rows(problem: Problem, layout: str) -> int:
    return int(lengths(problem).sum()) if layout == "packed" else problem.T * problem.B


def flops(problem: Problem, cell: str, mode: str, layout: str) -> int:
    """Of the matrix products: two a multiplication and addition, three times as many with the backward."""
    features = problem.I + problem.H + (problem.layers - 1) * 2 * problem.H
    once = 2 * rows(problem, layout) * gates_of(cell) * problem.H * features
    return once if mode == "infer" else 3 * once
