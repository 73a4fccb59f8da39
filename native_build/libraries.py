"""The two libraries: which files are compiled, by which flags, and how the result is linked."""

import platform
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

from native_build import ROOT
from native_build.cuda import cuda_instances, targets_for
from native_build.toolchain import Nvcc, compiler, dotted, torch_directory

# Run-time dispatch (csrc/cpu/isa.cpp) tests for just these flags.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    # GCC 12 warns about its own AVX-512 header; Clang knows only the first of these.
    INSTRUCTION_SETS["avx512"] += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"
# What of csrc/cpu is compiled for each of them; what takes longest comes first.
OF_EACH_SET = ("forward", "masked", "backward", "layer_norm", "quantized", "kernels")

STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"
LIMITED = "-DPy_LIMITED_API=0x030a0000"
CUDA_HOST_SOURCES = (
    "ops", "ops_layer_norm", "stack", "context", "streams", "sweep_host", "stepwise_host", "weight_grads", "plan",
)  # fmt: skip


class Object(NamedTuple):
    source: str
    name: str
    flags: str
    rule: str = "compile"


class Library(NamedTuple):
    objects: list[Object]
    flags: str = "-ltorch_cpu"


def header_flags() -> str:
    """Flags for what includes torch's headers: where these and Python's are; names of files that do not tell where the
    build was; and a guarded stack, which costs kernels time."""
    torch = torch_directory()
    headers = shlex.join(["-isystem", f"{torch}/include", "-isystem", sysconfig.get_paths()["include"]])
    names = shlex.join(f"-ffile-prefix-map={there}={name}" for there, name in ((ROOT, "seqkernels"), (torch, "torch")))
    return f"{headers} {names} -fstack-protector-strong"


def cpu_library(includes: str) -> Library:
    objects = [
        Object(f"csrc/cpu/{source}.cpp", f"{source}_{name}.o", f"-DSEQKERNELS_ISA={name} {flags}")
        for source in OF_EACH_SET
        for name, flags in reversed(INSTRUCTION_SETS.items())
    ]
    objects += [
        Object("csrc/cpu/ops.cpp", "ops.o", f"{includes} {STABLE}"),
        Object("csrc/cpu/ops_layer_norm.cpp", "ops_layer_norm.o", f"{includes} {STABLE}"),
        Object("csrc/python.cpp", "python.o", f"{includes} {STABLE} {LIMITED}"),
        Object("csrc/direct.cpp", "direct.o", f"{includes} {STABLE} {LIMITED}"),
        Object("csrc/cpu/isa.cpp", "isa.o", ""),
        Object("csrc/cpu/schedule.cpp", "schedule.o", ""),
        Object("csrc/cpu/pieces.cpp", "pieces.o", f"{includes} {STABLE}"),
        Object("csrc/cuda/plan.cpp", "cuda_plan.o", ""),
        Object("csrc/older_systems.cpp", "older_systems.o", ""),
    ]
    return Library(objects)


def cuda_library(includes: str, nvcc: Nvcc, targets: list[str], system: str) -> Library:
    """Built against any torch, but loaded by one with CUDA only. `system`: flags of the system's libraries."""
    includes += "".join(f" -isystem {shlex.quote(directory)}" for directory in nvcc.includes)
    objects = []
    for of in cuda_instances():
        own_targets = targets_for(of.source, targets)
        codes = " ".join(f"-gencode arch={t.replace('sm_', 'compute_')},code={t}" for t in own_targets)
        objects.append(Object(f"csrc/cuda/{of.source}.cu", f"cuda_{of.name}.o", f"{of.flags} {codes}", "compile_cuda"))
    objects.append(Object("csrc/cuda/dispatch.cpp", "cuda_dispatch.o", ""))
    objects.append(Object("csrc/older_systems.cpp", "cuda_older_systems.o", ""))
    built = f"""-DSEQKERNELS_CUDA_BUILD='"{dotted(nvcc.version)} {" ".join(targets)}"'"""
    for name in CUDA_HOST_SOURCES:
        objects.append(
            Object(f"csrc/cuda/{name}.cpp", f"cuda_{name}_host.o", f"-DUSE_CUDA {includes} {STABLE} {built}")
        )
    # The runtime's names stay inside, so that they are never another version's that torch has loaded.
    directories = shlex.join(f"-L{directory}" for directory in nvcc.libraries)
    return Library(objects, f"{directories} -lcudart_static -Wl,--exclude-libs,ALL {system} -ltorch -ltorch_cpu -lc10")


# The libraries whose functions glibc 2.34 moved into libc, and how these functions begin.
MOVED_INTO_LIBC = {"libdl.so.2": "dl", "libpthread.so.0": "pthread_|sem_", "librt.so.1": "shm_"}


def older_glibc(directory: Path) -> str:
    """Flags to link libdl, libpthread and librt so that the result loads from glibc 2.28 on, not only from this one on.

    The CUDA runtime calls them. A glibc from 2.34 on has their functions in libc twice, by a new version and by that of
    before, and the linker takes the new one; so it gets stand-ins for the libraries of before, made in `directory`.
    No program may run there: nvcc's load what they need from where they run."""

    def run(*command: str, input: str | None = None) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, input=input).stdout

    directory.mkdir(parents=True, exist_ok=True)
    cxx, libraries = shlex.split(compiler()), []
    symbols = run("nm", "-D", run(*cxx, "-print-file-name=libc.so.6").strip())
    found = re.findall(r" (\w+)(@@?)(GLIBC_[\d.]+)$", symbols, re.MULTILINE)
    moved = {name for name, mark, version in found if (mark, version) == ("@@", "GLIBC_2.34")}
    for library, beginnings in MOVED_INTO_LIBC.items():
        old = {name: v for name, mark, v in found if mark == "@" and name in moved and re.match(beginnings, name)}
        if not old:
            continue
        versions = directory / f"{library}.map"
        names = {version: [name for name in old if old[name] == version] for version in old.values()}
        versions.write_text("".join(f"{version} {{ {'; '.join(own)}; }};\n" for version, own in names.items()))
        assembly = "".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in old)
        assembly += '.section .note.GNU-stack, "", %progbits\n'
        options = f"-shared -nostdlib -Wl,-soname,{library} -x assembler -".split()
        libraries.append(str(directory / library))
        run(*cxx, *options, f"-Wl,--version-script,{versions}", "-o", libraries[-1], input=assembly)
    return f"{shlex.join(libraries)} -lpthread -ldl -lrt"
