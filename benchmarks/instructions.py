"""`python -m benchmarks instructions`: what nvcc makes of a step of the CUDA kernels; no GPU is needed.

Kernels that are one launch are compiled each by itself, which takes seconds: a GRU's and an LSTM's for an even number
of units, of which a single CTA has 128, a CTA of a cluster 64 and one of the grid 16. `one_sequence` is the kernel of a
single CTA for tiles of one, in float32. `sass.py` says what is counted.
"""

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks import InputError
from benchmarks.options import positive
from benchmarks.sass import StepCode, step_codes

ROOT = Path(__file__).parents[1]
PATHS = ("single_cta", "one_sequence", "cluster", "persistent_grid")
CELLS = ("gru", "lstm")
POLICIES = {"bfloat16": "TensorCore<bfloat16>", "tf32": "Tf32", "float32": "Fp32Fma"}
COLUMNS = ("loop", "way", "64-bit", "products", "first product", "state store", "registers", "spilled")


class Kernel(NamedTuple):
    path: str
    cell: str
    dtype: str
    backward: bool

    @property
    def source(self) -> str:
        of_pass = "Backward" if self.backward else "Forward"
        more = f"Cell::{self.cell}, {POLICIES[self.dtype]}, {str(self.backward).lower()}"
        config = f"SingleCtaConfig<Arch::sm_80, {more}, 128, true>"
        of_single_cta = ["single_cta_forward.cuh", "single_cta_backward.cuh"]
        kernel, headers = {
            "single_cta": (f"SingleCta{of_pass}<{config}>", of_single_cta),
            "one_sequence": (f"SingleCta{of_pass}<OneSequence<{config}>>", of_single_cta),
            "cluster": (
                f"Cluster{of_pass}<SliceConfig<Arch::sm_90, Path::cluster, {more}, 64, true>>",
                ["cluster.cuh"],
            ),
            "persistent_grid": (
                f"PersistentGrid{of_pass}<SliceConfig<Arch::sm_90, Path::persistent_grid, {more}, 16, true>>",
                ["persistent_grid.cuh"],
            ),
        }[self.path]
        lines = [f'#include "{header}"' for header in [*headers, "launch.cuh"]]
        entry = f"__global__ void entry<{kernel}>(const __grid_constant__ {kernel}::Parameters);"
        return "\n".join([*lines, f"namespace seqkernels::device {{ template {entry} }}", ""])


class Compiled(NamedTuple):
    # Of every loop of steps, a single CTA having one for tiles of up to 4 sequences; and of each for 1, 2, 4 and 8.
    steps: list[list[StepCode]]
    registers: int
    spilled: int  # bytes of a thread


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", nargs="+", choices=PATHS, default=PATHS, metavar="PATH", help=", ".join(PATHS))
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS, metavar="CELL", help=", ".join(CELLS))
    parser.add_argument(
        "--dtype", nargs="+", choices=[*POLICIES], default=[*POLICIES], metavar="DTYPE", help=", ".join(POLICIES)
    )
    parser.add_argument(
        "--csrc", type=Path, default=ROOT / "csrc", metavar="DIR", help="of another checkout (this one's)"
    )
    parser.add_argument("--target", default="sm_90a", help="%(default)s; sm_80 has the single CTA alone")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="compilers at once (%(default)s)")


def run(options: argparse.Namespace) -> int:
    every = itertools.product(options.path, options.cell, options.dtype, (False, True))
    kernels = [Kernel(*one) for one in every if one[0] != "one_sequence" or one[2] == "float32"]
    if not kernels:
        raise InputError("one_sequence has kernels in float32 alone: --dtype float32")
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")

    def compile(kernel: Kernel) -> Compiled:
        return compiled(kernel, options.csrc, options.target, nvcc, cuobjdump)

    print("| path | cell | dtype | pass |", " | ".join(COLUMNS), "|")
    print("| --- " * 4 + "| ---: " * len(COLUMNS) + "|")
    with ThreadPoolExecutor(options.jobs) as pool:
        for kernel, found in zip(kernels, pool.map(compile, kernels), strict=True):
            of_kernel = [kernel.path.replace("_", " "), kernel.cell, kernel.dtype]
            for name, step in named(kernel, found.steps):
                row = [*of_kernel, name, *map(str, step), str(found.registers), str(found.spilled)]
                print(f"| {' | '.join(row)} |", flush=True)
    return 0


def named(kernel: Kernel, loops: list[list[StepCode]]) -> Iterator[tuple[str, StepCode]]:
    """The steps by pass, loop and number of sequences, of those that there are several."""
    for number, of_loop in enumerate(loops):
        name = ("backward" if kernel.backward else "forward") + (f", loop {number + 1}" if number else "")
        for place, step in enumerate(of_loop):
            sequences = f", {1 << place} sequence{'s' if place else ''}" if len(of_loop) > 1 else ""
            yield name + sequences, step


def tool(name: str) -> str:
    """CUDA's program, or that of Triton's wheel, which has no compiler."""
    triton = importlib.util.find_spec("triton")
    brought = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ROOT
    found = shutil.which(name) or shutil.which(name, path=str(brought))
    if not found:
        raise InputError(
            f"no {name} here: it comes with the CUDA toolkit{'' if name == 'nvcc' else ' or with Triton'}."
        )
    return found


def compiled(kernel: Kernel, csrc: Path, target: str, nvcc: str, cuobjdump: str) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(kernel.source)
        said(nvcc, "-std=c++17", "-O3", "-I", csrc / "cuda", f"-arch={target}", "-cubin", "-o", binary, source)
        steps = step_codes(said(cuobjdump, "--dump-sass", binary))
        usage = said(cuobjdump, "--dump-resource-usage", binary)
    if not steps:
        raise InputError(f"no loop of steps in {kernel}: is it another instruction that multiplies or waits?")
    [(registers, stack, local)] = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    return Compiled(steps, int(registers), int(stack) + int(local))


def said(*command: str | Path) -> str:
    # cuobjdump looks for nvdisasm on the PATH.
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{Path(command[0]).parent}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout
