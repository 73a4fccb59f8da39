"""Names in a profile: with SEQKERNELS_NVTX=1, set before seqkernels is imported, each pass of each call is a range.

torch.profiler shows them, and on a GPU the tools that read NVTX, such as Nsight Systems. Without the variable nothing
is called.
"""

import contextlib
import os
from collections.abc import Callable

import torch

ON = os.environ.get("SEQKERNELS_NVTX") == "1"


def of_forward(run: Callable) -> Callable:
    """`ops.recurrence_forward` in a range that says cell, backend and, where there is a choice, path."""

    def run_in_range(plan, call, *args):
        path = f" ({plan.kernel})" if plan.kernel else ""
        return _in_range(f"seqkernels.{call.cell} forward: {plan.backend}{path}", run, plan, call, *args)

    return run_in_range


def of_backward(run: Callable) -> Callable:
    """`ops._backward` in a range that says cell and backend."""

    def run_in_range(ctx, backend, *args):
        return _in_range(f"seqkernels.{ctx.cell} backward: {backend}", run, ctx, backend, *args)

    return run_in_range


def _in_range(name: str, run: Callable, *args):
    if torch.compiler.is_compiling():  # the graph holds operators alone
        return run(*args)
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with torch.profiler.record_function(name), nvtx:
        return run(*args)
