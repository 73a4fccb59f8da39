"""`python -m seqkernels bench`: time GRU and LSTM on this machine, beside torch.nn's.

Both modules have the same weights and input, are checked against torch.nn in float64, and then run in rounds, so that
what else the machine does meets both; times are medians over the rounds, and "as fast" is the median of their ratios.
`python -m benchmarks` in a clone measures more, with more care.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import hardware

ROUND_SECONDS = 0.03  # of one module
CHECKED = 16  # steps and sequences
LIMIT = 1e-5  # relative error in float32, where torch.nn's own is smaller


class Shape(NamedTuple):
    """T steps, B sequences, I input size, H hidden size; named as in benchmarks/problems.py."""

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int


SHAPES = (
    Shape("names", 20, 64, 100, 100),
    Shape("charlm1", 200, 1, 128, 512),
    Shape("charlm", 200, 32, 128, 256),
)


class Case(NamedTuple):
    device: str
    cell: str
    shape: Shape
    training: bool

    def __str__(self) -> str:
        return f"{self.device} {self.cell} {self.shape.name} {'training' if self.training else 'inference'}"


class Row(NamedTuple):
    """Milliseconds a run, and how many times as fast ours is. What went wrong stands in `wrong`."""

    torch_ms: float = 0.0
    ours_ms: float = 0.0
    as_fast: float = 0.0
    wrong: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=_positive,
        default=30,
        metavar="N",
        help="for all of it, about (%(default)s); a case that takes longer is timed once",
    )
    devices = ("all", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="all", help="where (%(default)s: all that are here)")
    parser.add_argument("--threads", type=_count, metavar="N", help="of the CPU (as torch has them)")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 3600")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads from 1 to 1024")
    return int(text)


def run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m seqkernels bench: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])] if options.device == "all" else [options.device]
    before, busy = torch.get_num_threads(), busy_machine()
    torch.set_num_threads(options.threads or before)
    cells = [(cell, shape) for cell in ("GRU", "LSTM") for shape in SHAPES]
    cases = [Case(device, *what, training) for device in devices for training in (False, True) for what in cells]
    try:
        rows = {case: measure(case, until) for case, until in schedule(cases, options.seconds)}
        if busy:
            print(busy)
        for device in devices:
            show(device, {case: row for case, row in rows.items() if case.device == device})
    finally:
        torch.set_num_threads(before)
    return 1 if any(row.wrong for row in rows.values()) else 0


def busy_machine() -> str:
    """A sentence if other programs use the CPU; "" if not, or if that is unknown."""
    # Over the last minute, so before anything runs here.
    load, cpus = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    return f"The machine is busy (load {load:.1f} on {cpus} CPUs): these times say little." if load > 1.5 * cpus else ""


def schedule(cases: list[Case], seconds: float) -> Iterator[tuple[Case, float]]:
    """The cases, each with its share of the time that is left, as a point of time.monotonic(); and a progress bar."""
    end = time.monotonic() + seconds
    for number, case in enumerate(cases):
        show_progress(number, len(cases), str(case), sys.stderr)
        now = time.monotonic()
        yield case, now + (end - now) / (len(cases) - number)
    show_progress(len(cases), len(cases), "", sys.stderr)


def show_progress(number: int, count: int, what: str, file: TextIO) -> None:
    """A bar on a terminal, and elsewhere a line for each case."""
    if file.isatty():
        print(
            f"\r[{'#' * number:<{count}}] {number} of {count}  {what:<30}", end="\n" * (not what), file=file, flush=True
        )
    elif what:
        print(f"{number + 1} of {count}: {what}", file=file, flush=True)


def measure(case: Case, until: float) -> Row:
    """Rounds of both modules until that point of time.monotonic(), and one at least."""
    try:
        theirs, ours = modules(case)
        wrong = compare(case, theirs, ours)
        if wrong:
            return Row(wrong=wrong)
        runs = [run_of(case, module) for module in (theirs, ours)]
        for one in runs:
            one()  # what only the first run pays for
        first = [seconds_of(case, one, 1) for one in runs]
        counts = [max(1, int(ROUND_SECONDS / seconds)) for seconds in first]
        rounds: list[list[float]] = []
        while time.monotonic() < until:
            rounds.append([seconds_of(case, one, count) for one, count in zip(runs, counts, strict=True)])
    except (RuntimeError, ValueError) as error:  # out of memory; SEQKERNELS_BACKEND names one that cannot run here
        return Row(wrong=str(error).splitlines()[0])
    rounds = rounds or [first]
    torch_s, ours_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Row(1e3 * torch_s, 1e3 * ours_s, statistics.median(a / b for a, b in rounds))


def modules(case: Case) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs, ours = (getattr(of, case.cell)(case.shape.I, case.shape.H) for of in (nn, seqkernels))
    ours.load_state_dict(theirs.state_dict())
    return theirs.to(case.device), ours.to(case.device)


def data(case: Case) -> Tensor:
    shape = case.shape
    return torch.randn(shape.T, shape.B, shape.I, generator=torch.Generator().manual_seed(1)).to(case.device)


def compare(case: Case, theirs: nn.Module, ours: nn.Module) -> str:
    """What is wrong with our output for the first steps and sequences; "" if nothing is."""
    right = getattr(nn, case.cell)(case.shape.I, case.shape.H).to(case.device, torch.float64)
    right.load_state_dict(theirs.state_dict())
    x = data(case)[:CHECKED, :CHECKED]
    with torch.no_grad():
        expected = right(x.double())[0]
        found, own = ((module(x)[0] - expected).norm() / expected.norm() for module in (ours, theirs))
    limit = max(LIMIT, 2 * own.item())  # torch.nn rounds to TF32 where torch lets it
    return "" if found.item() <= limit else f"wrong: error {found.item():.1e}, torch.nn's own {own.item():.1e}"


def run_of(case: Case, module: nn.Module) -> Callable[[], Any]:
    x = data(case).requires_grad_(case.training)

    def infer() -> None:
        with torch.inference_mode():
            module(x)

    def train() -> None:
        module.zero_grad()
        x.grad = None
        y = module(x)[0]
        y.backward(torch.ones_like(y))

    return train if case.training else infer


def seconds_of(case: Case, one: Callable[[], Any], count: int) -> float:
    """Of one run, as a program that does nothing else sees it."""
    start = time.perf_counter()
    for _ in range(count):
        one()
    if case.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def show(device: str, rows: dict[Case, Row]) -> None:
    threads = torch.get_num_threads()
    where = f"{threads} thread{'s' * (threads > 1)} of a CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device == "cuda":
        where = hardware.gpu_of(torch.device("cuda")).name
    print(f"\nfloat32, {where}, torch {torch.__version__}, seqkernels {seqkernels.__version__}")
    missing = hardware.THIS_MACHINE.native_missing if device == "cpu" else hardware.THIS_MACHINE.cuda_missing
    if missing:
        print(f"Without our kernels: {missing}. `python -m seqkernels doctor` says what to do.")
    print(f"{'':<44}{'torch.nn ms':>12}{'seqkernels ms':>15}{'as fast':>9}")
    for case, row in rows.items():
        shape = case.shape
        sizes = f"T {shape.T}, B {shape.B}, H {shape.H}"
        line = f"{'training' if case.training else 'inference':<11}{case.cell:<6}{shape.name:<9}{sizes:<18}"
        print(line + (row.wrong or f"{row.torch_ms:>12.3g}{row.ours_ms:>15.3g}{row.as_fast:>7.2f} x"))
