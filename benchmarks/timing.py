"""Paired timing: each contender in a process of its own, asked in turn, block after block."""

import importlib
import itertools
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import InputError, profiling
from benchmarks.contenders import CONTENDERS, Case, Unavailable, errors, torch_like

BLOCK_SECONDS = 0.05  # of measuring, a contender and turn
MOST_RUNS = 2000  # in a block
REST_SECONDS = 0.02  # between two contenders: until their threads have stopped spinning


def peak_gflops(threads: int) -> float | None:
    """Multiplications and additions a second that this machine reaches with nothing else to do (GFLOP/s, float32).
    None if there are no compiled kernels to say."""
    torch.set_num_threads(threads)
    try:
        return importlib.import_module("seqkernels._C").peak_gflops()
    except ImportError:
        return None


class Worker:
    """A contender in its process."""

    def __init__(self, name: str, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, case, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: Any) -> Any:
        """Raises Unavailable with the contender's own reason."""
        try:
            self.pipe.send(request)
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise InputError(f"{self.name} ended with exit code {self.process.exitcode}; see above") from None
        if kind == "unavailable":
            raise Unavailable(answer)
        return answer

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(5)
        self.process.kill()


def serve(name: str, case: Case, pipe: Connection) -> None:
    """In the process: make the contender, then answer until the other side hangs up."""
    torch.set_num_threads(case.threads)
    try:
        run = CONTENDERS[name](case)
        results = [result.clone() for result in run()]
    except Unavailable as error:
        pipe.recv()
        pipe.send(("unavailable", str(error)))
        return
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        if request == "errors":
            # Against torch.nn in float64; the tests hold that, too, against the specification.
            right = torch_like(case._replace(dtype="float64"), torch.nn)()
            pipe.send(("answer", errors(results, right[: len(results)])))
        elif request == "memory":
            pipe.send(("answer", profiling.peak_memory(run, torch.device("cpu"))))
        else:
            pipe.send(("answer", [timed(run) for _ in range(request)]))


def timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired(workers: list[Worker], turns: int) -> dict[str, list[list[float]]]:
    """Seconds of every run of each worker: a block of runs in each turn, so that what else the machine does meanwhile
    falls on all of them."""
    runs = {}
    for worker in workers:
        warm = worker.ask(3)
        runs[worker.name] = max(1, min(MOST_RUNS, int(BLOCK_SECONDS / min(warm))))
    blocks: dict[str, list[list[float]]] = {worker.name: [] for worker in workers}
    for _ in range(turns):
        for worker in workers:
            time.sleep(REST_SECONDS)
            # The first runs of a block pay for what the others left in the caches, and for threads that sleep.
            count = runs[worker.name]
            blocks[worker.name].append(worker.ask(count + 1 + count // 10)[-count:])
    return blocks


def summary(blocks: list[list[float]]) -> dict[str, float]:
    """Milliseconds a run: median and quartiles over all runs."""
    times = list(itertools.chain.from_iterable(blocks))
    quarter, median, three_quarters = statistics.quantiles(times, n=4)
    return {"median_ms": median * 1e3, "q1_ms": quarter * 1e3, "q3_ms": three_quarters * 1e3, "runs": len(times)}


def speedup(theirs: list[list[float]], ours: list[list[float]]) -> dict[str, float]:
    """How many times as fast ours is: median and quartiles of the ratio that each turn gives."""
    ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True)]
    quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
    return {"median": median, "q1": quarter, "q3": three_quarters}
