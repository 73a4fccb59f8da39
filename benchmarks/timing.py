"""Paired timing: contenders run in turn, round after round; on a CPU each in a process of its own."""

import contextlib
import functools
import importlib
import itertools
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from benchmarks import InputError, profiling
from benchmarks.call_layers import LAYERS
from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, Unavailable, errors, torch_nn

MAX_RUNS = 2000  # of a contender in a round
CASE_SECONDS = 10  # after which there are rounds enough, if there are
MIN_ROUNDS = 9
FLUSHED_BYTES = 256 << 20  # more than any GPU's second-level cache


def peak_gflops(threads: int) -> float | None:
    """Multiplications and additions a second that this machine reaches with nothing else to do (GFLOP/s, float32).
    None if there are no compiled kernels to say."""
    torch.set_num_threads(threads)
    try:
        return importlib.import_module("seqkernels._C").peak_gflops()
    except ImportError:
        return None


class HostRuns(NamedTuple):
    """So many runs, of which the host's time is wanted: on a GPU they go on when it is over."""

    runs: int


class Timed(Protocol):
    """What `paired` asks a contender for."""

    name: str
    round_seconds: float  # of measuring it
    rest_seconds: float  # before it

    def request(self, wanted: Any) -> Any:
        """Seconds of so many runs; `HostRuns`: those of the host."""


class Worker:
    """A contender in its process, which runs one case after the other.

    root: the folder whose seqkernels is to be imported there instead of the installed one.
    label: what results are called, if not by the contender's name.
    """

    round_seconds = 0.02  # of measuring a contender
    rest_seconds = 0.02  # before it: until the threads of the one before have stopped spinning

    def __init__(self, name: str, threads: int, root: Path | None = None, label: str | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = label or name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, threads, root, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def request(self, wanted: Any) -> Any:
        """A Case: make the contender for it. "errors", "memory", "counts": of a run. A number: the seconds of so many
        runs; HostRuns: those of the host.

        Raises:
            Unavailable: the contender cannot run this case, with its own reason.
            InputError: the process is gone.
        """
        try:
            self.pipe.send(wanted)
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise InputError(f"{self.name} ended with exit code {self.process.exitcode}; see above") from None
        if kind == "unavailable":
            raise Unavailable(answer)
        return answer

    def alive(self) -> bool:
        return self.process.is_alive()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        self.process.kill()


class InProcess:
    """A contender here, with a Worker's methods: on a GPU, where nobody's threads spin, so that no time goes by in
    starting processes."""

    round_seconds, rest_seconds = 0.005, 0.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.case: Case | None = None
        self.run: Callable[[], list[torch.Tensor]] | None = None

    def request(self, wanted: Any) -> Any:
        """As of a Worker.

        Raises:
            Unavailable: the contender cannot run this case, with its own reason.
        """
        if not isinstance(wanted, Case):
            return answer_to(wanted, self.case, self.run)
        self.case, self.run = wanted, None
        self.run = CONTENDERS[self.name](wanted)

    def alive(self) -> bool:
        return True

    def stop(self) -> None:
        self.case = self.run = None


W = TypeVar("W", bound=Sequence[Worker | InProcess])


@contextlib.contextmanager
def stopping(workers: W) -> Iterator[W]:
    """Workers that are gone afterwards."""
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """A machine on which so many other processes compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def serve(name: str, threads: int, root: Path | None, pipe: Connection) -> None:
    """In the process: answer until the other side hangs up."""
    torch.set_num_threads(threads)
    if root:
        sys.path.insert(0, str(root))
        found = Path(str(importlib.import_module("seqkernels").__file__))
        if root.resolve() not in found.resolve().parents:
            raise ImportError(f"seqkernels comes from {found} and not from {root}")
    case: Case | None = None
    run: Callable[[], list[torch.Tensor]] | None = None
    with pipe:
        while True:
            try:
                request = pipe.recv()
            except EOFError:
                return
            try:
                if isinstance(request, Case):
                    case, run = request, None
                    run = (CONTENDERS | LAYERS)[name](case)
                    answer: Any = None
                else:
                    answer = answer_to(request, case, run)
                pipe.send(("answer", answer))
            except Unavailable as error:
                pipe.send(("unavailable", str(error)))


def answer_to(request: Any, case: Case | None, run: Callable[[], list[torch.Tensor]] | None) -> Any:
    assert case is not None and run is not None
    case.set_precision()  # of all that a process runs: another case may have set it
    with torch.inference_mode(case.mode == "infer"):
        return answer_in_mode(request, case, run)


def answer_in_mode(request: Any, case: Case, run: Callable[[], list[torch.Tensor]]) -> Any:
    device = torch.device(case.device)
    if request == "errors":
        results = [result.detach().double().cpu() for result in run()]
        return errors(results, right_results(case._replace(dtype="float64"))[: len(results)])
    if request == "memory":
        run()
        return profiling.peak_memory(run, device)
    if request == "counts":
        run()
        return profiling.counts(run, device)
    if isinstance(request, HostRuns):
        return [timed_on_host(run, device) for _ in range(request.runs)]
    clock = timed_on_gpu if device.type == "cuda" else timed
    return [clock(run) for _ in range(request)]


@functools.lru_cache(1)  # contenders of one process come case by case
def right_results(case: Case) -> list[torch.Tensor]:
    """By torch.nn in float64; the tests judge that, too, by the specification."""
    return [result.detach().cpu() for result in torch_nn(case)()]


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed_on_host(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that no run waits for room in the GPU's queue
    return timed(run)


def timed_on_gpu(run: Callable[[], Any]) -> float:
    """By the GPU's own clock, with nothing of the run before in its second-level cache."""
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def paired(workers: Sequence[Timed], rounds: int, host: bool = False) -> dict[str, list[list[float]]]:
    """Seconds of every run of each worker, by round: each runs in every round, so that what else the machine does
    meanwhile falls on all of them. Fewer rounds than wanted where runs are long. `host`: the host's seconds."""

    def wanted(count: int) -> int | HostRuns:
        return HostRuns(count) if host else count

    runs, seconds = {}, 0.0
    for worker in workers:
        warm = min(worker.request(wanted(3)))
        runs[worker.name] = max(1, min(MAX_RUNS, int(worker.round_seconds / warm)))
        seconds += warm * (runs[worker.name] + 1)
    rounds = min(rounds, max(MIN_ROUNDS, int(CASE_SECONDS / seconds)))
    times: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            time.sleep(worker.rest_seconds)
            # The first runs of a round pay for what the others left in the caches, and for threads that sleep.
            count = runs[worker.name]
            times[worker.name].append(worker.request(wanted(count + 1 + count // 10))[-count:])
    return times


def summary(rounds: list[list[float]]) -> dict[str, float]:
    """Milliseconds a run: median and quartiles over all runs."""
    times = list(itertools.chain.from_iterable(rounds))
    quarter, median, three_quarters = statistics.quantiles(times, n=4)
    return {"median_ms": median * 1e3, "q1_ms": quarter * 1e3, "q3_ms": three_quarters * 1e3, "runs": len(times)}


def speedup(theirs: list[list[float]], ours: list[list[float]]) -> dict[str, float]:
    """How many times as fast ours is: the median of the ratios of the rounds, and how far another run's median
    may lie from it (the order statistics that hold the true median between them 95 times in 100)."""
    ratios = sorted(statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True))
    rounds = len(ratios)
    low = max(0, math.floor((rounds - 1.96 * math.sqrt(rounds)) / 2))
    return {
        "speedup": statistics.median(ratios),
        "speedup_low": ratios[low],
        "speedup_high": ratios[rounds - 1 - low],
    }
