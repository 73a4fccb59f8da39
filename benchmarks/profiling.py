"""What a training step spends in the recurrent layer, and how much memory it takes at its peak."""

import contextlib
import ctypes
import importlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves


class LayerClock:
    """Adds up the seconds inside a module, forward and backward, from hooks on what goes in and what comes out.

    Backward, the module's part begins when the gradient of an output is complete and ends when that of an input is;
    where no input needs a gradient, it ends with the whole backward (`stop`).
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.began: float | None = None
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.exit),
        ]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, *_: Any) -> None:
        if self.began is None:
            self.began = self.now()

    def stop(self, *_: Any) -> None:
        if self.began is not None:
            self.seconds += self.now() - self.began
            self.began = None

    def enter(self, module: nn.Module, inputs: Any, keywords: Any) -> None:
        for tensor in differentiable((inputs, keywords)):
            tensor.register_hook(self.stop)
        self.start()

    def exit(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.stop()
        # Before the node, not at the tensor: where it is the next call's input, too, that call stops there first.
        for node in {tensor.grad_fn for tensor in differentiable(outputs) if tensor.grad_fn is not None}:
            node.register_prehook(self.start)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def differentiable(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree, is_leaf=lambda node: isinstance(node, PackedSequence))
    tensors = (leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves)
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


def layer_share(steps: Iterable[Callable[[], None]], module: nn.Module, device: torch.device) -> float:
    """The share of some training steps' time, and of making them, that is spent in `module`; each step runs once."""
    clock = LayerClock(module, device)
    began = clock.now()
    for step in steps:
        step()
        clock.stop()
    share = clock.seconds / (clock.now() - began)
    clock.remove()
    return share


def peak_memory(step: Callable[[], Any], device: torch.device) -> float:
    """Bytes that a training step takes at its peak above what there is before it; NaN where nobody can say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on
    except OSError:
        return math.nan
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def counts(run: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Of a run: what it launches on a GPU, and how often it asks torch for memory."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    on_gpu = sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in events)
    changes = (event["args"] for event in events if event.get("name") == "[memory]")
    kind = int(device.type == "cuda")  # torch's own numbers
    allocations = sum(change["Bytes"] > 0 and change["Device Type"] == kind for change in changes)
    return {"launches": on_gpu if device.type == "cuda" else None, "allocations": allocations}


def release_memory() -> None:
    """What the C library and our kernels keep for later calls would otherwise be missing from the next peak."""
    with contextlib.suppress(ImportError):  # a pure Python install keeps none
        importlib.import_module("seqkernels._C").release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
