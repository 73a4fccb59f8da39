"""Every CUDA kernel as it was compiled for GPUs that are not here: nothing spills, the instructions are those that were
meant, and there is a kernel for all that is planned and for nothing else."""

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cuda_paths import fitting, path_names
from gpus import GPUS

import seqkernels
from seqkernels.backends import cells
from seqkernels.hardware import GPU

LIBRARY = Path(seqkernels.__file__).with_name("_cuda.so")
NVIDIA = tuple(gpu for gpu in GPUS.values() if not gpu.amd)
H200 = GPUS["NVIDIA H200"]


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
        return "this install has no CUDA kernels"
    if not _tool():
        return "no cuobjdump here: Triton's wheel brings it (pip install triton)"
    if not shutil.which("c++filt"):
        return "no c++filt here: binutils bring it"
    version = re.search(r"release (\d+\.\d+)", run(_tool(), "--version"))[1]
    if [*map(int, version.split("."))] < [*map(int, _build()[0].split("."))]:
        return f"the cuobjdump here, {version}, is older than the nvcc that compiled the library, {_build()[0]}"
    return ""


pytestmark = [pytest.mark.skipif(bool(_missing()), reason=_missing()), pytest.mark.slow]


class Kernel(NamedTuple):
    """What the compiler made of a kernel."""

    name: str
    registers: int
    stack: int  # bytes a thread: spilled registers, and arrays that are not in registers
    local: int
    instructions: dict[str, int]  # of each kind that the tests ask for, how often


ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")
# STAS, SYNCS: pushes to peers, mbarriers; LDG, STG: vectors with tags; CCTL: empties the L1 cache.
TAGGED = r"LDG\.E\.128\.STRONG\.GPU", r"STG\.E\.128\.STRONG\.GPU"
KINDS = ("HMMA", "FFMA", "DFMA", "LDL", "STL", "STAS", "SYNCS", *TAGGED, "CCTL", *ATOMICS)


@functools.cache
def compiled(target: str) -> tuple[Kernel, ...]:
    """All kernels of the library that were compiled for `target`, by their C++ names."""

    code = {}
    for function in run(_tool(), "--gpu-architecture", target, "--dump-sass", LIBRARY).split("\t\tFunction : ")[1:]:
        name, _, text = function.partition("\n")
        found = re.findall(rf"\*/ +(?:@!?U?P\w+ +)?({'|'.join(KINDS)})\b", text)
        code[name] = {kind: sum(bool(re.fullmatch(kind, one)) for one in found) for kind in KINDS}
    usage = run(_tool(), "--gpu-architecture", target, "--dump-resource-usage", LIBRARY)
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert {name for name, *_ in usage} == set(code)
    names = run("c++filt", given="\n".join(name for name, *_ in usage)).splitlines()
    return tuple(
        Kernel(name, int(registers), int(stack), int(local), code[mangled])
        for name, (mangled, registers, stack, local) in zip(names, usage, strict=True)
    )


MATH_POLICIES = {
    "TensorCore<__nv_bfloat16>": (torch.bfloat16, False),
    "TensorCore<__half>": (torch.float16, False),
    "Tf32": (torch.float32, True),
    "Fp32Fma": (torch.float32, False),
}
CELLS = tuple(cells.CELLS)  # in the order of csrc/cells.h


# By the kind of their configurations; those with options by the option that stands for theirs in `planned`.
SINGLE_CTAS = {"SingleCta": "single CTA", "Masked": "single CTA with masks", "Norm": "single CTA with layer norm"}
OPTIONS = {"zoneout": SINGLE_CTAS["Masked"], "layer_norm": SINGLE_CTAS["Norm"]}


class Config(NamedTuple):
    """A kernel that is one launch, as its template arguments name it."""

    path: str
    cell: str
    dtype: torch.dtype
    tf32: bool
    backward: bool
    width: int  # hidden units that it is made for
    even: bool  # for an even number of hidden units, or for an odd one

    @property
    def exact(self) -> bool:
        """Whether float32 is multiplied as it is, without tensor cores."""
        return self.dtype == torch.float32 and not self.tf32


NAME = re.compile(
    r"(?P<kind>SingleCta|Slice|Masked|Norm)Config<\(seqkernels::Arch\)\d+, (?:\(seqkernels::Path\)(?P<path>\d), )?"
    r"\(seqkernels::Cell\)(?P<cell>\d), seqkernels::device::"
    rf"(?P<policy>{'|'.join(MATH_POLICIES)}), (?P<backward>true|false), (?P<width>\d+)(?:, (?P<even>true|false))?>"
)


@functools.cache
def configured(target: str, one_sequence: bool = False) -> dict[Config, Kernel]:
    """The kernels that are one launch, by what they are for; of a single CTA those for any tile or for one sequence."""
    kernels = {}
    for kernel in compiled(target):
        if "Config<" not in kernel.name or ("OneSequence<" in kernel.name) != one_sequence:
            continue
        name = NAME.search(kernel.name)
        assert name, f"no configuration can be read from {kernel.name}"
        path = path_names()[int(name["path"])] if name["path"] else SINGLE_CTAS[name["kind"]]
        config = Config(
            path,
            CELLS[int(name["cell"])],
            *MATH_POLICIES[name["policy"]],
            name["backward"] == "true",
            int(name["width"]),
            name["even"] == "true",
        )
        assert config not in kernels, f"two kernels for {config}"
        kernels[config] = kernel
    return kernels


@functools.cache
def planned(path: str, gpus: tuple[GPU, ...], largest: int, option: str = "") -> dict[Config, list[dict[str, Any]]]:
    """The kernels that plans of all layers of up to so many hidden units need on these GPUs, with the candidates."""
    kernels: dict[Config, list[dict[str, Any]]] = {}
    # Those with options multiply float32 as it is.
    policies = [policy for policy in MATH_POLICIES.values() if policy != MATH_POLICIES["Tf32"] or not option]
    layers = itertools.product(CELLS, policies, (False, True), range(1, largest + 1), gpus)
    for cell, (dtype, tf32), backward, hidden, gpu in layers:
        for one in fitting(path, gpu, cell, hidden, dtype, backward, tf32=tf32, option=option):
            even = hidden % 2 == 0 and not option
            config = Config(OPTIONS.get(option, path), cell, dtype, tf32, backward, one["width"], even)
            kernels.setdefault(config, []).append(one | {"hidden": hidden})
    return kernels


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


@pytest.fixture
def hopper() -> str:
    if "sm_90a" not in _build()[1]:
        pytest.skip(f"the CUDA kernels here are built for {', '.join(_build()[1])} only")
    return "sm_90a"


def test_registers_hold_the_weights_that_the_plan_says(hopper):
    plans = {
        **planned("single CTA", NVIDIA, 256),
        **planned("single CTA", NVIDIA, 256, "zoneout"),
        **planned("single CTA", NVIDIA, 256, "layer_norm"),
        **planned("cluster", (H200,), 1024),
        **planned("persistent grid", (H200,), 2112),
    }
    for config, kernel in configured(hopper).items():
        for one in plans[config]:
            assert kernel.registers * 4 * one["threads"] >= one["registers"], kernel
            assert kernel.registers * one["threads"] <= 65536, kernel


def test_tensor_cores_multiply_where_they_are_meant_to(target):
    for kernel in compiled(target):
        assert "Config<" in kernel.name or kernel.instructions["HMMA"] == 0, kernel
    for config, kernel in configured(target).items():
        assert (kernel.instructions["HMMA"] == 0) == config.exact, kernel
        assert kernel.instructions["DFMA"] == 0, kernel


def test_what_registers_have_is_multiplied_without_a_loop(target):
    """A weight by a sequence, with code for 1, 2, 4 and 8 of them, or 512 bytes of weights by 8 at once."""
    plans = planned("single CTA", NVIDIA, 256)
    for config, kernel in configured(target).items():
        if config.path == "single CTA":
            weights = plans[config][0]["registers"] // plans[config][0]["threads"] // 4
            products = weights * (1 + 2 + 4 + 8) if config.exact else weights * 4 * 32 // 512
            assert kernel.instructions["FFMA" if config.exact else "HMMA"] >= products, kernel


def test_a_kernel_for_one_sequence_has_more_weights_in_registers(target):
    plans = planned("single CTA", NVIDIA, 256)
    kernels = configured(target, one_sequence=True)
    assert {config.cell for config in kernels} == {"ligru", "gru", "lstm"}
    for config, kernel in kernels.items():
        one = plans[config][0]
        all_weights = config.width**2 * cells.CELLS[config.cell].gates
        expected = all_weights * 5 // 8 if config.cell == "lstm" and config.even else all_weights // 2
        assert config.exact and one["registers"] // 4 < all_weights
        assert kernel.instructions["FFMA"] * one["threads"] >= (expected if config.cell == "lstm" else all_weights)


def test_there_is_a_kernel_for_all_that_is_planned_and_for_nothing_else(target):
    for option in ("", *OPTIONS):
        there = {config for config in configured(target) if config.path == OPTIONS.get(option, "single CTA")}
        assert there == set(planned("single CTA", NVIDIA, 512, option))


def test_clusters_push_and_count_and_are_all_of_use(hopper):
    there = {config: kernel for config, kernel in configured(hopper).items() if config.path == "cluster"}
    older = [*map(int, _build()[0].split("."))] < [12, 7]
    for kernel in there.values():
        assert kernel.instructions["STAS"] and kernel.instructions["SYNCS"], kernel
        # Only the barrier before the first step, where nvcc knows a fence for the others.
        assert kernel.instructions["CCTL"] == 1 or older, kernel
    assert set(there) == set(planned("cluster", (H200,), 1024))


def test_the_persistent_grid_polls_vectors_whole_and_pushes_gradients_of_gates(hopper):
    there = {config: kernel for config, kernel in configured(hopper).items() if config.path == "persistent grid"}
    older = [*map(int, _build()[0].split("."))] < [12, 7]
    for config, kernel in there.items():
        assert all(kernel.instructions[kind] for kind in TAGGED), kernel
        assert bool(kernel.instructions["STAS"]) == config.backward, kernel
        # Only the barrier before the first step.
        assert kernel.instructions["CCTL"] == 1 or older, kernel
    assert set(there) == set(planned("persistent grid", (H200,), 2112))


def test_the_oldest_gpu_has_all_but_the_single_cta():
    """Those of a single CTA need tensor cores of compute capability 8.0."""
    older = [target for target in _build()[1] if target in ("sm_70", "sm_75")]
    if not older or "sm_80" not in _build()[1]:
        pytest.skip(f"the CUDA kernels here are built for {', '.join(_build()[1])} only")
    of_single_cta = re.compile("SingleCta|PackWeights")
    names = {kernel.name for kernel in compiled("sm_80") if not of_single_cta.search(kernel.name)}
    for target in older:
        assert {kernel.name for kernel in compiled(target)} == names
        assert not any(kernel.stack or kernel.local for kernel in compiled(target))
