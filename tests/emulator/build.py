"""Builds build/emulator/emulator.so: the CUDA kernels compiled for the CPU, with every access checked (run.h).

conftest.py lets the tests find it. setup.py, whose build this is, says which sources there are."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2].resolve()
_spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

PARTS = ("scheduler", "messages", "memory", "pushes", "device")


def library() -> "setup.Library":
    """-O1: of kernels that are unrolled for a GPU, -O2 makes little more."""
    flags = f"-DSEQKERNELS_EMULATOR -O1 {shlex.quote(f'-I{ROOT}/tests')} -Wno-unknown-pragmas"
    headers = setup.header_flags()
    kernels = [
        setup.Object(f"csrc/cuda/{of.source}.cu", f"{of.name}.o", f"{flags} {of.flags} -x c++")
        for of in setup.cuda_instances()
    ]
    host = [
        setup.Object(f"csrc/cuda/{name}.cpp", f"{name}_host.o", f"{flags} {headers} {setup.STABLE}")
        for name in setup.CUDA_HOST_SOURCES
    ]
    parts = [setup.Object(f"tests/emulator/{name}.cpp", f"{name}.o", f"{flags} -O2") for name in PARTS]
    return setup.Library(
        [
            *kernels,
            setup.Object("csrc/cuda/dispatch.cpp", "dispatch.o", flags),
            *host,
            *parts,
            setup.Object("tests/emulator/exchange.cpp", "exchange.o", flags),
            setup.Object(
                "tests/emulator/module.cpp",
                "module.o",
                f"{flags} {headers} -isystem {shlex.quote(pybind11.get_include())}",
            ),
        ]
    )


if __name__ == "__main__":
    target = ROOT / "build/emulator/emulator.so"
    if not setup.build({target: library()}, ROOT / "build/emulator-objects"):
        sys.exit("compiling the emulator failed, see above")
