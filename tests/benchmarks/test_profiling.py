"""What a training step spends in the recurrent layer, and its peak of memory."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import profiling


class Slow(nn.Module):
    """A layer of known cost, forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.04)
        return grad


def test_the_layers_share_counts_both_ways():
    layer = Slow()
    x = torch.ones(3, requires_grad=True)

    def step() -> None:
        y = layer(x * 2)
        time.sleep(0.06)
        y.sum().backward()

    share = profiling.layer_share([step] * 3, layer, torch.device("cpu"))
    assert 0.4 < share < 0.6  # of a sleep, not of a speed


def test_the_layers_share_of_a_cell_that_is_stepped():
    """What one call gives the next takes: the end of one backward is the beginning of another."""
    layer = Slow()
    x = torch.ones(3, requires_grad=True)

    def step() -> None:
        h = x * 2
        for _ in range(3):
            h = layer(h)
        time.sleep(0.18)
        h.sum().backward()

    assert 0.4 < profiling.layer_share([step] * 2, layer, torch.device("cpu")) < 0.6


def test_peak_memory_sees_what_is_freed_again():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    peak = profiling.peak_memory(lambda: torch.ones(8 << 20).sum(), torch.device("cpu"))
    assert 30e6 < peak < 60e6
