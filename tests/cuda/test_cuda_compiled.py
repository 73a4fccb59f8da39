"""Every CUDA kernel as it was compiled for GPUs that are not here: nothing spills, the instructions are those that were
meant, and there is a kernel for all that `select` chooses and for nothing else."""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from gpus import GPUS

import seqkernels
from seqkernels.backends import cells, cuda

LIBRARY = Path(seqkernels.__file__).with_name("_cuda.so")
NVIDIA = [gpu for gpu in GPUS.values() if not gpu.amd]


def run(*command: str | Path, given: str | None = None) -> str:
    return subprocess.run(command, input=given, check=True, capture_output=True, text=True).stdout


def _tool() -> str | None:
    """cuobjdump, with the nvdisasm that it needs: that of a CUDA toolkit, else Triton's."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin" if triton else None
    return shutil.which("cuobjdump") or (brought and shutil.which("cuobjdump", path=str(brought)))


@functools.cache
def _build() -> tuple[str, list[str]]:
    """nvcc's version, and what the library was built for, as `cuda_build` in csrc/cuda/ops.cpp says it; a torch
    without CUDA cannot load it to ask."""
    said = re.search(rb"(\d+\.\d+)((?: (?:sm|compute)_\d+[af]?)+)\0", LIBRARY.read_bytes())
    return said[1].decode(), said[2].decode().split()


def _missing() -> str:
    if not LIBRARY.exists():
        return "this install has no CUDA kernels: no nvcc when built"
    if not _tool():
        return "no cuobjdump here: Triton's wheel brings it (pip install triton)"
    if not shutil.which("c++filt"):
        return "no c++filt here: binutils bring it"
    version = re.search(r"release (\d+\.\d+)", run(_tool(), "--version"))[1]
    if [*map(int, version.split("."))] < [*map(int, _build()[0].split("."))]:
        return f"the cuobjdump here, {version}, is older than the nvcc that compiled the library, {_build()[0]}"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


class Kernel(NamedTuple):
    """What the compiler made of a kernel."""

    name: str
    registers: int
    stack: int  # bytes a thread: spilled registers, and arrays that are not in registers
    local: int
    instructions: dict[str, int]  # of each kind that the tests ask for, how often


ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")
# STAS, SYNCS: pushes to peers, mbarriers; UBLKCP: copies to a cluster; CCTL: empties the L1 cache.
KINDS = ("HMMA", "FFMA", "DFMA", "LDL", "STL", "STAS", "SYNCS", "UBLKCP", "CCTL", *ATOMICS)


@functools.cache
def compiled(target: str) -> tuple[Kernel, ...]:
    """All kernels of the library that were compiled for `target`, by their C++ names."""

    code = {}
    for function in run(_tool(), "--gpu-architecture", target, "--dump-sass", LIBRARY).split("\t\tFunction : ")[1:]:
        name, _, text = function.partition("\n")
        found = re.findall(rf"\*/ +(?:@!?U?P\w+ +)?({'|'.join(KINDS)})\b", text)
        code[name] = {kind: found.count(kind) for kind in KINDS}
    usage = run(_tool(), "--gpu-architecture", target, "--dump-resource-usage", LIBRARY)
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert {name for name, *_ in usage} == set(code)
    names = run("c++filt", given="\n".join(name for name, *_ in usage)).splitlines()
    return tuple(
        Kernel(name, int(registers), int(stack), int(local), code[mangled])
        for name, (mangled, registers, stack, local) in zip(names, usage, strict=True)
    )


class SingleCta(NamedTuple):
    """A single CTA kernel, as its template arguments name it."""

    cell: str
    dtype: torch.dtype
    tf32: bool
    backward: bool
    width: int
    even: bool  # for an even number of hidden units, or for an odd one
    blocks: int  # of 16 units that a warp has
    held: int  # groups of fragments that a thread holds in registers

    @property
    def threads(self) -> int:
        return self.width // 16 // self.blocks * 32

    @property
    def fragments(self) -> int:
        """32 bytes of the weights each, in a thread's registers."""
        return cells.CELLS[self.cell].gates * min(self.held, self.width * self.dtype.itemsize // 64 * self.blocks)

    def serves(self, hidden_size: int) -> bool:
        return hidden_size <= self.width and self.even == (hidden_size % 2 == 0)


CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # as csrc/params.h numbers them
PRODUCTS = {
    "MatrixCores<__nv_bfloat16>": (torch.bfloat16, False),
    "MatrixCores<__half>": (torch.float16, False),
    "Tf32": (torch.float32, True),
    "Exact": (torch.float32, False),
}
NAME = re.compile(
    r"SingleCta(?P<pass>Forward|Backward)<.*?\(seqkernels::Cell\)(?P<cell>\d), seqkernels::device::"
    rf"(?P<product>{'|'.join(PRODUCTS)}), (?P<width>\d+), (?P<blocks>\d+), (?P<held>\d+), (?P<even>true|false)>"
)


def configurations(target: str, path: str, pattern: re.Pattern, make: Callable[..., NamedTuple]) -> dict:
    """The kernels of a path by the configuration that `make` has from the layer and the sizes in their names."""
    found = {}
    for kernel in compiled(target):
        if path not in kernel.name:
            continue
        name = pattern.search(kernel.name)
        assert name, f"no configuration can be read from {kernel.name}"
        layer = CELLS[int(name["cell"])], *PRODUCTS[name["product"]], name["pass"] == "Backward"
        key = make(layer, name)
        assert key not in found, f"two kernels for {key}"
        found[key] = kernel
    return found


def single_ctas(target: str) -> dict[SingleCta, Kernel]:
    def make(layer, name):
        return SingleCta(*layer, int(name["width"]), name["even"] == "true", int(name["blocks"]), int(name["held"]))

    return configurations(target, "SingleCta", NAME, make)


class Slices(NamedTuple):
    """A kernel for a cluster or for the persistent grid, as its template arguments name it."""

    cell: str
    dtype: torch.dtype
    tf32: bool
    backward: bool
    units: int
    even: bool
    warps: int
    fragments: int  # of 32 bytes that a thread holds in registers


SLICE = re.compile(
    r"Slice(?P<pass>Forward|Backward)<.*?\(seqkernels::Cell\)(?P<cell>\d), seqkernels::device::"
    rf"(?P<product>{'|'.join(PRODUCTS)}), (?P<units>\d+), (?P<warps>\d+), (?P<held>\d+), (?P<even>true|false)>"
)


def slices(target: str, path: str) -> dict[Slices, Kernel]:
    """Of the path "Cluster" or "PersistentGrid"."""

    def make(layer, name):
        return Slices(*layer, int(name["units"]), name["even"] == "true", int(name["warps"]), int(name["held"]))

    return configurations(target, f"::{path}S", SLICE, make)


def all_slices(target: str) -> list[tuple[Slices, Kernel]]:
    return [one for path in ("Cluster", "PersistentGrid") for one in slices(target, path).items()]


def chosen() -> set[tuple[str, torch.dtype, bool, bool, int]]:
    """(cell, dtype, TF32, backward, hidden size) of all layers that `select` gives to a single CTA on any GPU."""
    return {
        (cell, dtype, tf32, backward, hidden)
        for cell in CELLS
        for dtype, tf32 in PRODUCTS.values()
        for backward in (False, True)
        for hidden in range(1, 513)
        if any(cuda.single_cta(cell, hidden, False, dtype, tf32, gpu, backward) for gpu in NVIDIA)
    }


@pytest.fixture(params=["sm_80", "sm_90a"])
def target(request) -> str:
    if request.param not in _build()[1]:
        pytest.skip(f"the CUDA kernels here are built for {', '.join(_build()[1])} only")
    return request.param


def test_no_kernel_spills(target):
    spilling = [
        f"{kernel.name}: {kernel.stack} bytes of stack, {kernel.local} of local memory"
        for kernel in compiled(target)
        if kernel.stack or kernel.local or kernel.instructions["LDL"] or kernel.instructions["STL"]
    ]
    assert not spilling, "\n".join(spilling)


def test_no_kernel_adds_in_an_order_of_chance(target):
    """Atomic additions come in whatever order blocks and threads do: another one, other bits."""
    assert not [kernel.name for kernel in compiled(target) if any(kernel.instructions[kind] for kind in ATOMICS)]


def test_weights_lie_where_select_says(target):
    for configuration, kernel in single_ctas(target).items():
        cell, dtype, tf32, backward, width, even, *_ = configuration
        gates, hidden = cells.CELLS[cell].gates, width - (0 if even else 1)
        assert kernel.registers >= configuration.fragments * 8, kernel
        assert kernel.registers * configuration.threads <= 65536, kernel
        for gpu in NVIDIA:
            if cuda.single_cta(cell, hidden, False, dtype, tf32, gpu, backward):
                found = cuda.residency(cell, hidden, dtype, tf32, gpu, backward)
                assert found.registers == configuration.fragments * 32 * configuration.threads
                assert sum(found) == gates * width * width * dtype.itemsize
    for configuration, kernel in all_slices(target):
        assert kernel.registers >= configuration.fragments * 8, kernel
        assert kernel.registers * configuration.warps * 32 <= 65536, kernel


def test_matrix_cores_multiply_where_they_are_meant_to(target):
    for kernel in compiled(target):
        if "SingleCta" not in kernel.name and "Slice" not in kernel.name:
            assert kernel.instructions["HMMA"] == 0, kernel
    for configuration, kernel in all_slices(target):
        exact = configuration.dtype == torch.float32 and not configuration.tf32
        assert (kernel.instructions["HMMA"] == 0) == exact, kernel
        assert kernel.instructions["DFMA"] == 0, kernel
    for configuration, kernel in single_ctas(target).items():
        exact = configuration.dtype == torch.float32 and not configuration.tf32
        assert (kernel.instructions["HMMA"] == 0) == exact, kernel
        assert kernel.instructions["DFMA"] == 0, kernel
        # What registers hold is multiplied without a loop: a weight by a sequence, with code for 1, 2, 4 and 8 of them,
        # or 512 bytes of weights by 8 at once.
        weights = configuration.fragments * 8
        products = weights * (1 + 2 + 4 + 8) if exact else weights * 4 * 32 // 512
        assert kernel.instructions["FFMA" if exact else "HMMA"] >= products, kernel


def test_there_is_a_kernel_for_all_that_select_chooses_and_for_nothing_else(target):
    there, used = set(single_ctas(target)), set()
    for *layer, hidden in sorted(chosen(), key=str):
        serving = [one for one in there if list(one[:4]) == layer and one.serves(hidden)]
        assert serving, f"no kernel for {layer} of {hidden} units"
        used.add(min(serving, key=lambda one: one.width))
    assert there == used, f"never chosen: {sorted(there - used, key=str)}"


@pytest.fixture
def hopper() -> str:
    if "sm_90a" not in _build()[1]:
        pytest.skip(f"the CUDA kernels here are built for {', '.join(_build()[1])} only")
    return "sm_90a"


def fitting(find: Callable, widest: int) -> set[tuple]:
    """(cell, dtype, TF32, backward, units, even) of all that `find`, of `select`, has for layers on an H200."""
    return {
        (cell, dtype, tf32, backward, found.units, hidden % 2 == 0)
        for cell in CELLS
        for dtype, tf32 in PRODUCTS.values()
        for backward in (False, True)
        for hidden in range(1, widest + 1)
        for found in find(cell, hidden, False, dtype, tf32, GPUS["NVIDIA H200"], backward)[0]
    }


def test_clusters_push_and_count_and_are_all_of_use(hopper):
    there = slices(hopper, "Cluster")
    older = [*map(int, _build()[0].split("."))] < [12, 7]
    for kernel in there.values():
        assert kernel.instructions["STAS"] and kernel.instructions["SYNCS"], kernel
        # Only the barrier before the first step, where nvcc knows a fence for the others.
        assert kernel.instructions["CCTL"] == 1 or older, kernel
    assert {configuration[:6] for configuration in there} == fitting(cuda.clusters, 1024)


def test_the_persistent_grid_copies_states_and_pushes_gradients_of_gates(hopper):
    there = slices(hopper, "PersistentGrid")
    for configuration, kernel in there.items():
        assert kernel.instructions["STAS" if configuration.backward else "UBLKCP"], kernel
        assert kernel.instructions["SYNCS"], kernel
    used = {(*layer, even) for *layer, _, even in fitting(cuda.persistent_grid, 2112)}
    assert {(*configuration[:4], configuration.even) for configuration in there} == used


def test_the_oldest_gpu_has_all_but_the_single_cta():
    """Those of a single CTA need matrix cores of compute capability 8.0."""
    older = [target for target in _build()[1] if target in ("sm_70", "sm_75")]
    if not older or "sm_80" not in _build()[1]:
        pytest.skip(f"the CUDA kernels here are built for {', '.join(_build()[1])} only")
    of_one_block = re.compile("SingleCta|ArrangeKernel")
    names = {kernel.name for kernel in compiled("sm_80") if not of_one_block.search(kernel.name)}
    for target in older:
        assert {kernel.name for kernel in compiled(target)} == names
        assert not any(kernel.stack or kernel.local for kernel in compiled(target))
