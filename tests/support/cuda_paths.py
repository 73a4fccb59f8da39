"""The CUDA operators by a path of the caller's choice, with planted faults in the emulator; what can run on GPUs that
are not here."""

from typing import Any

import pytest
import torch
from operators import Call, both_passes

from seqkernels import hardware
from seqkernels.backends import call
from seqkernels.backends.cuda.launch import PassLaunch, candidates, path_names
from seqkernels.hardware import GPU

THIS_GPU = hardware.gpu_of(torch.empty(0).device)


def path(name: str, tile: int = 8, units: int = 0, chunks: int = 1) -> PassLaunch:
    return PassLaunch(path_names().index(name), tile, units, chunks)


STEPWISE, SINGLE_CTA = path("stepwise", tile=0), path("single CTA")


def by_path(launch: PassLaunch, tf32: bool = False):
    """Both operators, called as those of `seqkernels.ops` are: behind what all have come a launch and layers, if there
    are several."""
    operators = torch.ops.seqkernels
    return (
        lambda *args: operators.cuda_forward(*args[:7], tf32, *launch, *args[8:]),
        lambda *args: operators.cuda_backward(*args[:13], tf32, *launch, *args[14:]),
    )


def found(
    gpu: GPU,
    cell: str,
    hidden: int,
    dtype: torch.dtype,
    backward: bool = False,
    *,
    tf32: bool = False,
    projected: bool = False,
    directions: int = 1,
    sequences: int = 1,
    option: str = "",
) -> dict[str, list[dict[str, Any]]]:
    """All candidates for a pass, by their path."""
    layer = call.Call(
        cell, "cuda", dtype, hidden_size=hidden, projected=projected, tf32=tf32, directions=directions,
        sequences=sequences, options=(option,) if option else (),
    )  # fmt: skip
    by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in path_names()}
    for one in candidates(layer, gpu, backward):
        by_name[one["path"]].append(one)
    return by_name


def fitting(name: str, *layer, **more) -> list[dict[str, Any]]:
    """Those of one path that can run; the layer as for `found`."""
    return [one for one in found(*layer, **more)[name] if not one["reason"]]


def asked_of(emulator, call: Call, passes) -> list[dict[str, int]]:
    """What each pass asks for, by the names of run.h, and how many tensors it results in."""
    found = []

    def counted(run):
        def counting(*args):
            before = emulator.counts()
            results = run(*args)
            now = {name: count - before[name] for name, count in emulator.counts().items()}
            found.append(now | {"results": sum(len(one) if isinstance(one, list) else 1 for one in results)})
            return results

        return counting

    both_passes(call, *map(counted, passes))
    return found


def faulty(emulator, run, fault: str, event: int = 0):
    """The operator with a fault planted (tests/emulator/run.h)."""

    def with_fault(*args):
        emulator.plant(getattr(emulator.Fault, fault), event)
        try:
            return run(*args)
        finally:
            emulator.plant(emulator.Fault.none)

    return with_fault


def assert_caught(emulator, cell: str, launch: PassLaunch, fault: tuple[str, str, int, str], seeds: int = 8) -> None:
    """The planted fault is found in every order of threads, and nothing is found without it; 90 units and four steps.
    `fault`: the pass, the kind, which of a thread's operations, and the message."""
    which, kind, event, message = fault
    layer = Call(cell, 1, 8, 4, 90, dtype=torch.bfloat16)
    forward, back = by_path(launch)
    for seed in range(seeds):
        emulator.seed(seed)
        passes = {"forward": forward, "backward": back}
        passes[which] = faulty(emulator, passes[which], kind, event)
        with pytest.raises(RuntimeError, match=message):
            both_passes(layer, *passes.values())
    both_passes(layer, forward, back)
