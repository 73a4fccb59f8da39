"""What this machine compiles with: a C++ compiler, torch's headers, and for GPUs nvcc."""

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


def words_of(variable: str) -> list[str]:
    """The words of an environment variable, by the shell's rules; ends with a sentence where these do not hold."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        sys.exit(f"{variable}={text} is no part of a command line: {str(error).lower()}")


def compiler() -> str:
    wanted = shlex.join(words_of("CXX"))
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    sys.exit(
        f"seqkernels needs a C++17 compiler, and {wanted or 'none of c++, g++, clang++'} is not to be found; install "
        "one, or set SEQKERNELS_BUILD=none for the pure Python package"
    )


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("seqkernels is built against torch, which is not installed here: pip install torch")
    return Path(spec.origin).parent


def gpus_here(driver: str = "libcuda.so.1") -> list[int]:
    """The compute capabilities of this machine's NVIDIA GPUs, 90 for 9.0, as their driver says."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return []
    count, major, minor, found = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), []
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for device in range(count.value):
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(10 * major.value + minor.value)
    return found


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else environment.get("PATH", ""))


class Nvcc(NamedTuple):
    """A compiler for GPUs."""

    path: str
    version: tuple[int, int]
    capabilities: tuple[int, ...]  # that it compiles for: 75 is 7.5
    includes: tuple[str, ...]  # directories of CUDA's headers and libraries
    libraries: tuple[str, ...]


WITHOUT_CUDA = "SEQKERNELS_BUILD=cpu, with FORCE_CUDA unset, builds the CPU kernels alone"
OLDEST_NVCC = (12, 1)  # the first whose PTX (8.1) has st.async, by which the blocks of a cluster push


def examine(path: str | None) -> Nvcc:
    """Facts about the nvcc at `path`; ends with a sentence where there is none, or one that is too old."""
    if not path:
        sys.exit(
            "FORCE_CUDA=1 or SEQKERNELS_BUILD=cuda needs nvcc, which is neither at CUDA_HOME or CUDA_PATH nor on the "
            f"PATH; install NVIDIA's CUDA toolkit; {WITHOUT_CUDA}"
        )

    def run(*arguments: str) -> str:
        try:
            done = subprocess.run([path, *arguments], capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return done.stdout + done.stderr

    def directories(found: re.Match | None, option: str) -> tuple[str, ...]:
        return tuple(w.removeprefix(option) for w in shlex.split(found[1] if found else "") if w.startswith(option))

    another = f"name another by CUDA_HOME; {WITHOUT_CUDA}"
    said = run("--version").strip()
    found = re.search(r"release (\d+)\.(\d+)", said)
    if not found:
        sys.exit(f"{path} does not say its version, but {said or 'nothing'}; {another}")
    version = int(found[1]), int(found[2])
    if version < OLDEST_NVCC:
        sys.exit(f"seqkernels needs nvcc {dotted(OLDEST_NVCC)} or newer, and {path} is {dotted(version)}; {another}")
    capabilities = sorted({int(number) for number in re.findall(r"compute_(\d+)", run("--list-gpu-arch"))})
    steps = run("--dryrun", "-x", "cu", "/dev/null")
    includes, libraries = (re.search(rf"{what}=(.*)", steps) for what in (" INCLUDES", " LIBRARIES"))
    return Nvcc(
        path,
        version,
        tuple(capabilities),
        directories(includes, "-I"),
        directories(libraries, "-L"),
    )


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
