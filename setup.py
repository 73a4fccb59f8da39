"""Builds the compiled parts, seqkernels/_C.abi3.so for the CPU and seqkernels/_cuda.so for NVIDIA GPUs; everything else
about the package stands in pyproject.toml.

SEQKERNELS_BUILD=cpu builds the first, =cuda both, on any machine with an nvcc; =none makes a pure Python package. Unset
means cuda where there are an nvcc and a GPU, or with FORCE_CUDA=1, and else cpu. How, is said in native_build: which
files and flags (libraries.py), the CUDA kernels and their targets (cuda.py), nvcc and the C++ compiler (toolchain.py).

nvcc is that of CUDA_HOME or CUDA_PATH, or else of PATH. TORCH_CUDA_ARCH_LIST, in torch's syntax ("8.0;9.0a+PTX"), names
what it compiles for; unset means the GPUs here, or else what cuda.targets_of says. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS
mean what they always mean. The libraries stand on LibTorch's stable ABI: torch's headers are needed to build, but the
result runs with every torch from 2.10 on, so nothing depends on which torch, with or without CUDA, that is.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# pip runs this before it reads requires-python in pyproject.toml, and without build isolation takes any setuptools.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"seqkernels needs Python 3.10 or newer, and this is {sys.version.split()[0]}")
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"seqkernels is built by setuptools 77 or newer, and this is {setuptools.__version__}: "
        'pip install "setuptools>=77"'
    )
if "develop" in sys.argv:  # pip since 21.3 asks for no such command
    sys.exit("seqkernels is installed with -e by pip 21.3 or newer: pip install -U pip")

sys.path.insert(0, str(Path(__file__).parent.resolve()))  # where pip does not look by itself

from native_build import ROOT, cuda, libraries, ninja, toolchain


def parts_of(environment: Mapping[str, str], nvcc: str | None, gpus: list[int]) -> list[str]:
    """The names of the parts that SEQKERNELS_BUILD and FORCE_CUDA ask for; `nvcc` is the one that was found."""
    build, force = environment.get("SEQKERNELS_BUILD", ""), environment.get("FORCE_CUDA") or "0"
    if force not in ("0", "1"):
        sys.exit(f"FORCE_CUDA={force} is not known; it may be 1, to build the CUDA kernels in any case, or 0")
    if force == "1" and build in ("cpu", "none"):
        sys.exit(f"FORCE_CUDA=1 asks for the CUDA kernels, and SEQKERNELS_BUILD={build} for none: unset one of them")
    parts = {
        "": ["cpu", "cuda"] if force == "1" or (nvcc and gpus) else ["cpu"],
        "cpu": ["cpu"],
        "cuda": ["cpu", "cuda"],
        "none": [],
    }
    if build in parts:
        return parts[build]
    sys.exit(
        f"SEQKERNELS_BUILD={build} is not known; it may be cpu, cuda or none (pure Python); unset, it is cuda where "
        "there are an nvcc and a GPU, and else cpu"
    )


def left_out(nvcc: str | None) -> str:
    """What a build for the CPU says where nobody asked for one."""
    missing, first = ("GPU", "") if nvcc else ("nvcc", "after installing NVIDIA's CUDA toolkit, ")
    return (
        f"seqkernels: no CUDA kernels, as there is no {missing} here; {first}"
        "FORCE_CUDA=1 pip install --no-build-isolation -e . builds them"
    )


def check_platform(platform: str, free_threaded: bool) -> None:
    """End with a sentence where the compiled parts do not run."""
    if platform != "linux":
        sys.exit(
            f"seqkernels' compiled part is for Linux, not for {platform}; SEQKERNELS_BUILD=none installs the pure "
            "Python package"
        )
    if free_threaded:
        sys.exit(
            "seqkernels' compiled part is for Pythons with a GIL (its stable ABI, abi3, does not load without); "
            "SEQKERNELS_BUILD=none installs the pure Python package"
        )


def full_disk(*directories: Path, min_mb: int = 50) -> str:
    """What may be why a build failed where hardly any room is left; "" where there is."""
    said = ""
    for directory in directories:
        there = next(one for one in (directory, *directory.parents) if one.exists())
        free = shutil.disk_usage(there).free >> 20
        said += f"only {free} MB are free for {directory}; " if free < min_mb else ""
    return said


class BuildNative(build_ext):
    """Builds all libraries by one build.ninja."""

    def get_ext_filename(self, name: str) -> str:
        # No Python module: torch loads it.
        path = name.replace(".", os.sep)
        return f"{path}.so" if path.endswith("_cuda") else super().get_ext_filename(name)

    def run(self) -> None:
        super().run()
        if self.inplace and CUDA not in self.extensions:
            (ROOT / "seqkernels/_cuda.so").unlink(missing_ok=True)  # that of a build before, of other sources perhaps

    def build_extensions(self) -> None:
        directory = Path(self.build_temp).resolve()
        if self.editable_mode:  # whose own is thrown away; objects in a directory that stays are compiled once
            directory = ROOT / f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        remedy = f"{toolchain.WITHOUT_CUDA}; " if CUDA in self.extensions else ""
        try:
            done = ninja.build(self.libraries_in(directory), directory, NVCC or "")
            failed = "" if done else "compiling failed, see above"
        except (OSError, subprocess.CalledProcessError) as error:
            failed = f"the build ended: {error}"
        if failed:
            compilers = Path(os.environ.get("TMPDIR") or "/tmp")  # where they write what is not to stay
            sys.exit(
                f"seqkernels: {failed}; {full_disk(directory, compilers)}{remedy}SEQKERNELS_BUILD=none installs the "
                "pure Python package"
            )

    def libraries_in(self, directory: Path) -> dict[Path, libraries.Library]:
        """What is to be built, by the files that it becomes; one line says what."""
        native, of_gpus = (Path(self.get_ext_fullpath(extension.name)).resolve() for extension in (NATIVE, CUDA))
        built = {native: libraries.cpu_library(libraries.header_flags())}
        if CUDA in self.extensions:
            nvcc = toolchain.examine(NVCC)
            targets = cuda.targets_of(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST"), toolchain.gpus_here())
            by = f"nvcc {toolchain.dotted(nvcc.version)} ({nvcc.path})"
            print(f"seqkernels: CUDA kernels for {', '.join(targets)} by {by}", flush=True)
            system = libraries.older_glibc(directory / "older_glibc")
            built[of_gpus] = libraries.cuda_library(libraries.header_flags(), nvcc, targets, system)
        else:
            of_gpus.unlink(missing_ok=True)  # that of a build before would be taken along
            if not os.environ.get("SEQKERNELS_BUILD"):
                print(left_out(NVCC), flush=True)
        return built


def headers() -> list[str]:
    return [str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.*h"))]


NATIVE = Extension(
    "seqkernels._C",
    sources=list(dict.fromkeys(of.source for of in libraries.cpu_library("").objects)),
    depends=headers(),
    py_limited_api=True,
)
CUDA = Extension(
    "seqkernels._cuda",
    sources=[
        "csrc/older_systems.cpp",
        *(f"csrc/cuda/{name}.cpp" for name in (*libraries.CUDA_HOST_SOURCES, "dispatch")),
        *(f"csrc/cuda/{name}.cu" for name in cuda.CUDA_SOURCES),
    ],
    depends=headers(),
)
NVCC = toolchain.find_nvcc(os.environ)

if __name__ == "__main__":
    parts = parts_of(os.environ, NVCC, toolchain.gpus_here())
    if parts:
        check_platform(sys.platform, bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
    setup(
        ext_modules=[{"cpu": NATIVE, "cuda": CUDA}[part] for part in parts],
        cmdclass={"build_ext": BuildNative},
        # What pip puts into an isolated build, when it asks; a pure Python build needs no torch.
        setup_requires=["torch>=2.10", "ninja"] if parts and "setuptools.build_meta" in sys.modules else [],
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if parts else {},
    )
