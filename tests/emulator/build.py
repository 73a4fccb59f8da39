"""Builds build/emulator/emulator.so: the CUDA kernels compiled for the CPU, with every access checked (run.h).

conftest.py lets the tests find it. The build is setup.py's: native_build says which sources there are."""

import shlex
import sys
from pathlib import Path

import pybind11

sys.path.insert(0, str(Path(__file__).parents[2].resolve()))

from native_build import ROOT, cuda, ninja
from native_build.libraries import CUDA_HOST_SOURCES, STABLE, Library, Object, header_flags

PARTS = ("scheduler", "messages", "memory", "pushes", "tags", "device")


def library() -> Library:
    """-O1: of kernels that are unrolled for a GPU, -O2 makes little more."""
    flags = f"-DSEQKERNELS_EMULATOR -O1 {shlex.quote(f'-I{ROOT}/tests')} -Wno-unknown-pragmas"
    headers = header_flags()
    kernels = [
        Object(f"csrc/cuda/{of.source}.cu", f"{of.name}.o", f"{flags} {of.flags} -x c++")
        for of in cuda.cuda_instances()
    ]
    host = [
        Object(f"csrc/cuda/{name}.cpp", f"{name}_host.o", f"{flags} {headers} {STABLE}") for name in CUDA_HOST_SOURCES
    ]
    parts = [Object(f"tests/emulator/{name}.cpp", f"{name}.o", f"{flags} -O2") for name in PARTS]
    return Library(
        [
            *kernels,
            Object("csrc/cuda/dispatch.cpp", "dispatch.o", flags),
            *host,
            *parts,
            Object("tests/emulator/exchange.cpp", "exchange.o", flags),
            Object(
                "tests/emulator/module.cpp",
                "module.o",
                f"{flags} {headers} -isystem {shlex.quote(pybind11.get_include())}",
            ),
        ]
    )


if __name__ == "__main__":
    target = ROOT / "build/emulator/emulator.so"
    if not ninja.build({target: library()}, ROOT / "build/emulator-objects"):
        sys.exit("compiling the emulator failed, see above")
