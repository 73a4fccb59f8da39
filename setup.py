"""Builds the compiled part, seqkernels/_C.abi3.so; everything else about the package stands in pyproject.toml.

SEQKERNELS_BUILD=cpu (default) builds the CPU kernels, =none makes a pure Python package, and =host_run builds for tests
host_run.so, the CUDA kernels compiled for the CPU (tests/host_run), and nothing else. CXX, CXXFLAGS, LDFLAGS and
MAX_JOBS mean what they always mean. The library stands on LibTorch's stable ABI: torch's headers are needed to build,
but the result runs with every torch from 2.10 on, so nothing depends on which torch, with or without CUDA, that is.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD = os.environ.get("SEQKERNELS_BUILD") or "cpu"
if BUILD not in ("cpu", "none", "host_run"):
    sys.exit(
        f"SEQKERNELS_BUILD={BUILD} is not known; it may be cpu (the default), none (pure Python) or host_run (tests)"
    )

# Run-time dispatch (csrc/cpu/dispatch.cpp) tests for just these flags.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"

# -Wno-maybe-uninitialized: GCC 12 warns about its own AVX-512 header.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-maybe-uninitialized -Wno-unknown-warning-option"


def compiler() -> str:
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    sys.exit(
        f"seqkernels needs a C++17 compiler, and {wanted or 'none of c++, g++, clang++'} is not to be found; install "
        "one, or set SEQKERNELS_BUILD=none for the pure Python package"
    )


def ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return found or sys.exit("seqkernels is built by ninja, which is not to be found: pip install ninja")


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit("seqkernels is built against torch, which is not installed here: pip install torch")
    return Path(spec.origin).parent


STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def native_objects(includes: str) -> list[tuple[str, str, str]]:
    """(source, object, flags) of seqkernels._C."""
    objects = [
        ("csrc/library.cpp", "library.o", f"{includes} {STABLE} -DPy_LIMITED_API=0x030a0000"),
        ("csrc/cpu/dispatch.cpp", "dispatch.o", ""),
        ("csrc/cpu/schedule.cpp", "schedule.o", ""),
    ]
    for name, flags in INSTRUCTION_SETS.items():
        objects.append(("csrc/cpu/kernels.cpp", f"kernels_{name}.o", f"-DSEQKERNELS_ISA={name} {flags}"))
    return objects


def host_run_objects(includes: str) -> list[tuple[str, str, str]]:
    """(source, object, flags) of host_run. -O1: of kernels that are unrolled for a GPU, -O2 makes little more."""
    import pybind11

    flags = f"-DSEQKERNELS_HOST_RUN -O1 -I{ROOT.resolve() / 'tests'} -Wno-unknown-pragmas"
    kernels = [(f"csrc/cuda/{name}.cu", f"{name}.o", f"{flags} -x c++") for name in ("stepwise", "single_block")]
    return [
        *kernels,
        ("csrc/cuda/library.cpp", "library.o", f"{flags} {includes} {STABLE}"),
        ("tests/host_run/run.cpp", "run.o", f"{flags} -O2"),
        ("tests/host_run/module.cpp", "module.o", f"{flags} {includes} -isystem {pybind11.get_include()}"),
    ]


class BuildNative(build_ext):
    """Writes one build.ninja and runs it."""

    def build_extension(self, extension: Extension) -> None:
        cxx, torch = compiler(), torch_directory()
        temporary = Path(self.build_temp).resolve()
        temporary.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = f"-isystem {torch}/include -isystem {sysconfig.get_paths()['include']}"
        objects = (host_run_objects if extension is HOST_RUN else native_objects)(includes)
        lines = [
            f"flags = {FLAGS} {os.environ.get('CXXFLAGS', '')}",
            "rule compile",
            f"  command = {cxx} $flags $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared $in -o $out -L{torch}/lib -Wl,--no-as-needed -ltorch_cpu "
            f"{os.environ.get('LDFLAGS', '')}",
        ]
        for source, target_object, more in objects:
            lines += [f"build {target_object}: compile {ROOT.resolve() / source}", f"  more = {more}"]
        lines += [f"build {target}: link {' '.join(name for _, name, _ in objects)}", ""]
        (temporary / "build.ninja").write_text("\n".join(lines))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja(), "-C", str(temporary), *jobs]).returncode:
            sys.exit("seqkernels: compiling failed, see above; SEQKERNELS_BUILD=none installs the pure Python package")


NATIVE = Extension(
    "seqkernels._C",
    sources=["csrc/library.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/schedule.cpp", "csrc/cpu/kernels.cpp"],
    depends=[str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.h"))],
    py_limited_api=True,
)

HOST_RUN = Extension("host_run", sources=["tests/host_run/module.cpp"])

setup(
    ext_modules={"none": [], "cpu": [NATIVE], "host_run": [HOST_RUN]}[BUILD],
    cmdclass={"build_ext": BuildNative},
    # What pip puts into an isolated build; a pure Python build needs no torch.
    setup_requires=[] if BUILD == "none" else ["torch>=2.10", "ninja"],
    options={} if BUILD == "none" else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
