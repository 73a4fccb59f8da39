"""The shapes that are measured, by name; the same names stand in tests, result rows and the README."""

from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """One layer: T steps, B sequences, I input size, H hidden size."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int


PROBLEMS = {
    "step": Problem(1, 1, 128, 256),
    "names": Problem(20, 64, 100, 100),
    "names256": Problem(20, 256, 100, 100),
    "news": Problem(50, 32, 100, 128),
    "charlm": Problem(200, 32, 128, 256),
    "charlm1": Problem(200, 1, 128, 512),
    "big": Problem(64, 64, 512, 512),
    "big1024": Problem(64, 16, 1024, 1024),
}
CELLS = ("GRU", "LSTM", "RNN")
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


def lengths(problem: Problem) -> Tensor:
    """``[B]`` lengths of a packed batch: evenly spread from T / 3 to T, the longest T, in no order."""
    spread = torch.linspace(problem.T / 3, problem.T, problem.B).round().long().clamp(min=1)
    spread[-1] = problem.T
    return spread[torch.randperm(problem.B, generator=torch.Generator().manual_seed(0))]


def rows(problem: Problem, layout: str) -> int:
    return int(lengths(problem).sum()) if layout == "packed" else problem.T * problem.B


def flops(problem: Problem, cell: str, mode: str, layout: str) -> int:
    """Of the matrix products: two a multiplication and addition, three times as many with the backward."""
    once = 2 * rows(problem, layout) * GATES[cell] * problem.H * (problem.I + problem.H)
    return once if mode == "infer" else 3 * once
