"""Trying recurrent modules inside their model: what they are called with, and which of two is the faster there."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

Hear = Callable[[str, Any, tuple, dict], None]  # a module's name, the module, and what it is called with
ROUNDS, SECONDS = 5, 0.2  # of a trial, at least


def listen(model: nn.Module, modules: Mapping[str, nn.Module], args: tuple, kwargs: dict, hear: Hear) -> None:
    """Call the model once, and tell of each call of `modules`; random numbers and buffers are as before afterwards."""
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():

            def tell(module: nn.Module, args: tuple, kwargs: dict, name: str = name) -> None:
                hear(name, module, args, kwargs)

            stack.callback(module.register_forward_pre_hook(tell, with_kwargs=True).remove)
        gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(gpus))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.func.functional_call(model, buffers, args, kwargs)


def compare(first: nn.Module, second: nn.Module, args: tuple, kwargs: dict) -> float:
    """How many times as fast the second is as the first: by the medians of rounds in which each runs once.

    What is called here runs as the caller's code does: under autocast, or without gradients. With gradients a backward
    pass is timed as well, whose gradients are added to no tensor of the caller's.
    """
    seconds: tuple[list[float], list[float]] = [], []
    with torch.random.fork_rng({p.device.index for p in first.parameters() if p.device.type == "cuda"}):
        for module in (first, second):  # the first call of either may be a long one
            _seconds(module, args, kwargs)
        end = time.perf_counter() + SECONDS
        while len(seconds[1]) < ROUNDS or time.perf_counter() < end:
            for module, measured in zip((first, second), seconds, strict=True):
                measured.append(_seconds(module, args, kwargs))
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def _seconds(module: nn.Module, args: tuple, kwargs: dict) -> float:
    """Of one call, past hooks."""
    args, kwargs = _cut((args, kwargs))
    wanted = [t for t in (*module.parameters(), *_tensors((args, kwargs))) if t.requires_grad]
    device = next(module.parameters()).device
    _wait(device)
    begin = time.perf_counter()
    outputs = [y for y in _tensors(module.forward(*args, **kwargs)) if y.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)
    _wait(device)
    return time.perf_counter() - begin


def _tensors(values) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _cut(values):
    """The same values, whose gradients end here."""

    def cut(value):
        if isinstance(value, Tensor):
            return value.detach().requires_grad_(value.requires_grad)
        if isinstance(value, PackedSequence):
            return value._replace(data=cut(value.data))
        return value

    return pytree.tree_map(cut, values)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
