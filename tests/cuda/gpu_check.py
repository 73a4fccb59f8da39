"""All that a GPU can show, in two commands of at most six minutes each; nothing is built or installed.

    python tests/cuda/gpu_check.py first --out DIR     # tests, how processes end, calls, steps
    python tests/cuda/gpu_check.py second --out DIR    # kernels beside cuDNN, compute-sanitizer, Nsight Compute

Each part is a process of its own and has its time, after which it is killed; the next ones run whatever came of it. DIR
then has a log and the rows of each command: no more than eight files. --dry prints the command lines alone.
"""

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2].resolve()
RUN = "tests/cuda/gpu_run.py"
# What tests data, plots and machine code, which no GPU changes.
IGNORED = ("tests/benchmarks", "tests/cpu", "tests/triton/test_triton_compiled.py", "tests/cuda/test_cuda_compiled.py")
LIMIT = 360  # seconds of a command


class Part(NamedTuple):
    name: str
    seconds: int
    arguments: list[str]  # of Python, or with a program before it
    program: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def command(self) -> list[str]:
        return [*self.program, sys.executable, *self.arguments]


def here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tests() -> Part:
    arguments = ["-m", "pytest", "-q", *(f"--ignore={path}" for path in IGNORED)]
    arguments += ["-n", "8"] if here("xdist") else []  # a worker whose CUDA is lost is replaced
    arguments += ["--timeout", "60"] if here("pytest_timeout") else []
    return Part("tests", 170, arguments, environment=(("SEQKERNELS_TEST_DEVICE", "cuda"), ("OMP_NUM_THREADS", "1")))


def benchmark(name: str, seconds: int, out: Path, *arguments: str) -> Part:
    return Part(name, seconds, ["-m", "benchmarks", name, *arguments, "--out", str(out)])


def sanitize(tool: str, seconds: int, *layers: str) -> Part:
    """Without torch's allocator, so that what lies outside of a tensor lies outside of all."""
    program = (
        "compute-sanitizer",
        "--tool",
        tool,
        "--kernel-name",
        "kernel_substring=seqkernels",
        "--error-exitcode",
        "1",
    )
    return Part(tool, seconds, [RUN, *layers], program, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def profile(name: str, kernels: str, count: int, *problem: str) -> Part:
    program = "ncu", "--clock-control", "none", "--set", "detailed", "--kernel-name-base", "demangled"
    program += "--kernel-name", f"regex:{kernels}", "--launch-count", str(count)
    return Part(name, 40, [RUN, "--problem", *problem, "--cell", "GRU", "LSTM", "--dtype", "bfloat16"], program)


def parts(which: str, out: Path) -> list[Part]:
    """The most important first."""
    on_gpu = "--device", "cuda"
    if which == "first":
        found = [tests(), Part("exits", 40, ["tests/cuda/exits.py"]), benchmark("calls", 60, out, *on_gpu)]
        if here("benchmarks.steps"):
            found.append(benchmark("steps", 90, out, "--budget", "80"))
        return found
    problems = "names256", "news", "charlm", "cliff129", "cliff256", "long", "big1024", "flashrnn", "kernelbench"
    cases = "--problem", *problems, "--cell", "GRU", "LSTM", "--dtype", "bfloat16", "float32"
    contenders = "--contender", "torch.nn", "torch.nn float16", "seqkernels", "seqkernels cuda", "--rounds", "9"
    return [
        benchmark("kernels", 120, out, *on_gpu, *cases, *contenders),
        sanitize("memcheck", 60, "--cell", "GRU", "LSTM", "--dtype", "float32", "bfloat16"),
        sanitize("racecheck", 90, "--cell", "GRU", "--dtype", "bfloat16", "--hidden", "64", "300", "800"),
        profile("profile of the single CTA", "SingleCta", 4, "news"),
        profile("profile of slices", "Slice", 8, "charlm"),
    ]


def run(part: Part, log) -> int:
    """The part's exit code, 124 where its time was over; its processes end with it."""
    log.write(f"\n=== {part.name}: {shlex.join(part.command())}\n")
    log.flush()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(part.environment)}
    try:
        process = subprocess.Popen(
            part.command(), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    except FileNotFoundError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(part.seconds)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["first", "second"])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check", metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="print the command lines, run nothing")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    found = parts(options.which, out)
    if options.dry:
        for part in found:
            print(shlex.join(part.command()))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    codes = {}
    with open(out / f"{options.which}.log", "w") as log:
        for part in found:
            begun = time.monotonic()
            codes[part.name] = run(part, log)
            said = {0: "passed", 124: f"killed after {part.seconds} s", 127: f"no {part.command()[0]} here"}
            print(
                f"{part.name:26}{time.monotonic() - begun:6.0f} s  {said.get(codes[part.name], 'failed')}", flush=True
            )
    print(f"Log: {out / options.which}.log")
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
