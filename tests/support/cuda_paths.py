"""The CUDA operators by a path of the caller's choice, and with planted faults in the emulator."""

import pytest
import torch
from operators import Call, both_passes

from seqkernels import _C, hardware
from seqkernels.backends.cuda import Path

GPU = hardware.gpu_of(torch.empty(0).device)
SHARED = GPU.shared_memory
SINGLE_CTA = Path("single CTA", 8)


def by_path(path: Path, tf32: bool = False):
    """Both operators."""
    operators, launch = torch.ops.seqkernels, (_C.CUDA_PATHS.index(path.name), path.tile, path.units)
    return (
        lambda *args: operators.cuda_forward(*args, tf32, *launch),
        lambda *args: operators.cuda_backward(*args, tf32, *launch),
    )


def faulty(emulator, run, fault: str, event: int = 0):
    """The operator with a fault planted (tests/emulator/run.h)."""

    def with_fault(*args):
        emulator.plant(getattr(emulator.Fault, fault), event)
        try:
            return run(*args)
        finally:
            emulator.plant(emulator.Fault.none)

    return with_fault


def assert_caught(emulator, cell: str, path: Path, fault: tuple[str, str, int, str], seeds: int = 8) -> None:
    """A fault (of which pass, which, which of a thread's, and what is said), whatever the order of threads; and nothing
    without it. Of 90 units and four steps."""
    which, kind, event, message = fault
    call = Call(cell, 1, 8, 4, 90, dtype=torch.bfloat16)
    forward, back = by_path(path)
    for seed in range(seeds):
        emulator.seed(seed)
        passes = {"forward": forward, "backward": back}
        passes[which] = faulty(emulator, passes[which], kind, event)
        with pytest.raises(RuntimeError, match=message):
            both_passes(call, *passes.values())
    both_passes(call, forward, back)
