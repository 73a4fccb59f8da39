"""The translation units of the CUDA kernels, and what each is compiled for."""

import re
import sys
from typing import NamedTuple

from native_build import ROOT
from native_build.toolchain import Nvcc, dotted

# The lowest compute capability that a file's kernels can be compiled for.
CUDA_SOURCES = {
    "stepwise": 70,
    "masked_stepwise": 70,
    "norm_stepwise": 70,
    "pack_weights": 80,
    "single_cta": 80,
    "masked_single_cta": 80,
    "norm_single_cta": 80,
    "occupancy": 90,
    "cluster": 90,
    "persistent_grid": 90,
}
# For clusters, from 9.0 on: beside machine code for some of these GPUs there is no PTX for others, which takes a third
# of the compiler's time. A GPU without code for `occupancy` is said to run no clusters (csrc/cuda/ops.cpp).
CUDA_OF_CLUSTERS = ("occupancy", "cluster", "persistent_grid")
# Whose path is for 9.0 alone (has_path() in csrc/cuda/config.h).
CUDA_FOR_90 = ("persistent_grid",)
# Those that are one launch are compiled for each cell and dtype, so that ninja uses all cores; the clusters, which take
# longest, for each pass as well (csrc/cuda/instances.h).
CUDA_PASSES = {"_forward": " -DSEQKERNELS_PASS=ForwardArgs", "_backward": " -DSEQKERNELS_PASS=BackwardArgs"}
CUDA_INSTANCED = {"single_cta": {"": ""}, "cluster": CUDA_PASSES, "persistent_grid": {"": ""}}
_NAMES = (ROOT / "csrc/cells.h").read_text().partition("enum class Cell {")[2].partition("}")[0]
CELLS = [name.strip() for name in _NAMES.split(",")]
CUDA_DTYPES = {
    name: f"-DSEQKERNELS_SCALAR_NAME={scalar} -DSEQKERNELS_TF32={tf32}"
    for name, scalar, tf32 in (
        ("float32", "float32", "false"),
        ("tf32", "float32", "true"),
        ("bfloat16", "bfloat16", "false"),
        ("float16", "float16", "false"),
    )
}


class Instance(NamedTuple):
    """A translation unit of the CUDA kernels: a file, or its part for one cell and dtype (TF32 is one), or one pass."""

    source: str
    name: str
    flags: str


def cuda_instances() -> list[Instance]:
    """Those that take longest come first."""
    instances = [
        Instance(
            source,
            f"{source}{of_pass}_{cell}_{dtype}",
            f"-DSEQKERNELS_CELL_NAME={cell} {dtype_flags}{pass_flags}",
        )
        for dtype, dtype_flags in CUDA_DTYPES.items()
        for cell in reversed(CELLS)
        for source, passes in CUDA_INSTANCED.items()
        for of_pass, pass_flags in passes.items()
    ]
    return instances + [Instance(source, source, "") for source in CUDA_SOURCES if source not in CUDA_INSTANCED]


def targets_of(nvcc: Nvcc, wanted: str | None, gpus: list[int]) -> list[str]:
    """What to compile for: machine code for sm_*, and PTX, which newer GPUs' drivers compile, for compute_*.

    `wanted` is TORCH_CUDA_ARCH_LIST. The default is the GPUs here; where there are none, or some that nvcc does not
    know, it is A100 with its relatives, H100, and PTX for all that comes after them, and, for the kernels that can, the
    oldest GPU that nvcc knows."""
    names = (wanted or "").replace(";", " ").split()
    if not names and gpus and all(gpu >= min(CUDA_SOURCES.values()) and gpu in nvcc.capabilities for gpu in gpus):
        return [f"sm_{gpu}a" if gpu == 90 else f"sm_{gpu}" for gpu in sorted(set(gpus))]
    if not names:
        oldest = [capability for capability in nvcc.capabilities if 70 <= capability < 80][:1]
        return [*(f"sm_{capability}" for capability in oldest), "sm_80", "sm_90a", "compute_80"]
    targets, ptx = [], []
    for name in names:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={wanted}: {name} is no compute capability like 8.0, 9.0a or 8.0+PTX")
        capability = int(found[1] + found[2])
        if capability < min(CUDA_SOURCES.values()) or capability not in nvcc.capabilities:
            known = [dotted(divmod(one, 10)) for one in nvcc.capabilities]
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST={wanted}: {name} is not to be had; the kernels need 7.0 or more, and nvcc "
                f"{dotted(nvcc.version)} ({nvcc.path}) compiles for {', '.join(known)}"
            )
        targets.append(f"sm_{capability}{found[3]}")
        if found[4]:
            ptx.append(f"compute_{capability}{found[3]}")
    return list(dict.fromkeys(targets + ptx))


def targets_from(lowest: int, targets: list[str]) -> list[str]:
    """Those of `targets` that a file can be compiled for which needs `lowest`, so that every GPU from there on that the
    others have code for has that file's as well."""
    able = []
    for target in targets:
        kind, _, number = target.partition("_")
        if int(number.rstrip("af")) >= lowest:
            able.append(target)
        elif kind == "compute":
            able.append(f"compute_{lowest}")
    return list(dict.fromkeys(able)) or [f"compute_{lowest}"]


def targets_for(source: str, targets: list[str]) -> list[str]:
    """Those of `targets` that a file of CUDA_SOURCES is compiled for."""
    able = targets_from(CUDA_SOURCES[source], targets)
    if source not in CUDA_OF_CLUSTERS:
        return able
    own = [target for target in able if target.startswith("sm_90" if source in CUDA_FOR_90 else "sm_")]
    return own or able
