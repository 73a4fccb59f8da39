"""Judges a module against the float64 specification, beside torch.nn."""

from dataclasses import replace

import torch
from cases import WITH_RELU, Case, run_ours, run_spec, run_torch
from tolerances import assert_as_close_as_torch

from seqkernels import select
from seqkernels.hardware import machine_of

DEVICE = torch.empty(0).device
NO_CUDNN = select.unsupported("cudnn", select.Call("gru", DEVICE.type, torch.float32), machine_of(DEVICE))


def judged(results: dict, case: Case) -> dict:
    """Without gradients where they cannot be compared: in 16 bits a relu whose input rounds across zero has another
    gradient, and does so at other places in torch.nn than in ours. test_ops judges them, from one forward pass."""
    kinked = case.cell in WITH_RELU and case.dtype in (torch.float16, torch.bfloat16)
    return {name: value for name, value in results.items() if not (kinked and name.startswith("grad"))}


def assert_right(case: Case, backend: str | None, draws: int | None = None) -> None:
    # With few numbers in a draw, more draws are needed before errors average out.
    draws = draws or max(3, 32 // case.hidden_size)
    cases = [replace(case, seed=case.seed + 3 * draw) for draw in range(draws)]
    ours, torchs, spec = (
        [judged(run(case), case) for case in cases] for run in (lambda c: run_ours(c, backend), run_torch, run_spec)
    )
    assert_as_close_as_torch(ours, torchs, spec, case.dtype)
