"""`python -m benchmarks kernels`: layers beside their contenders, checked first, then timed in rounds."""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import InputError, problems, record
from benchmarks.cases import Case, add_case_options, cases_of
from benchmarks.contenders import CONTENDERS, OURS, OWN, USUAL, Unavailable, explain, versions
from benchmarks.options import add_out, check_device, round_count, thread_count
from benchmarks.problems import flops
from benchmarks.timing import InProcess, Worker, busy, paired, peak_gflops, speedup, stopping, summary

QUICK_ROUNDS = 31
# A difference that is taken for none, however little the runs of one process spread: where memory happens to lie makes
# as much from one process to the next.
INDIFFERENCE = 0.05


def add_options(parser: argparse.ArgumentParser) -> None:
    add_case_options(parser)
    parser.add_argument(
        "--contender",
        nargs="+",
        default=list(USUAL),
        choices=["all", *CONTENDERS],
        metavar="NAME",
        help=f"{', '.join(CONTENDERS)}, all (usual: {', '.join(USUAL)})",
    )
    parser.add_argument("--rounds", type=round_count, default=51, metavar="N", help="of all contenders (%(default)s)")
    parser.add_argument(
        "--busy",
        type=thread_count,
        default=0,
        metavar="N",
        help="measure again while so many other processes compute all the time",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"a first look: {' '.join(problems.QUICK)}, {QUICK_ROUNDS} rounds"
    )
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result was wrong."""
    check_device(options.device)
    names = list(CONTENDERS) if "all" in options.contender else list(dict.fromkeys(options.contender))
    cases = cases_of(options, problems.QUICK if options.quick else problems.USUAL)
    file = options.out / "kernels.jsonl"
    started = record.environment()["time"]
    failed = False
    for threads, group in itertools.groupby(cases, key=lambda case: case.threads):
        peak = peak_gflops(threads)
        print(f"threads: {threads}; peak:", f"{peak:.0f} GFLOP/s" if peak else "not known without compiled kernels")
        on_gpu = options.device.startswith("cuda")
        workers = [InProcess(name) if on_gpu else Worker(name, threads) for name in names]
        with stopping(workers):
            for case in group:
                try:
                    rounds = QUICK_ROUNDS if options.quick else options.rounds
                    rows = measure(case, workers, rounds, busy_processes=options.busy)
                except InputError as reason:  # of the problem's data; a dead worker would say so again
                    if all(worker.alive() for worker in workers):
                        print(f"{title(case)} left out: {reason}", flush=True)
                        continue
                    raise
                if peak:  # the best so far, as something else may have been at work when it was first measured
                    peak = max(peak, peak_gflops(threads) or 0)
                common = {"benchmark": "kernels", "run": started, **facts(case), "peak_gflops": peak}
                rows = [common | row for row in rows]
                failed |= not rows[0]["right"]
                record.append(file, *rows)
                show(case, rows)
    print(f"Rows: {file}")
    return int(failed)


def facts(case: Case) -> dict[str, Any]:
    """What all rows of a case share: what was run, and where."""
    described = {**case._asdict(), **case.shape._asdict()}
    del described["shape"]
    return {**record.environment(), **described, "plan": explain(case)}


def measure(
    case: Case, workers: Sequence[Worker | InProcess], rounds: int, host: bool = False, busy_processes: int = 0
) -> list[dict[str, Any]]:
    """A row for each contender: its errors, whether all of ours pass the gate, and the times (the `host`'s) if so;
    those on a busy machine as well if there are to be busy processes."""
    work = flops(case.shape, case.cell, case.mode, case.layout)
    rows, able = {}, []
    for worker in workers:
        row: dict[str, Any] = {"contender": worker.name, "version": versions(worker.name), "absent": None}
        try:
            worker.request(case)
            row |= {"errors": worker.request("errors"), "memory_bytes": worker.request("memory")}
            able.append(worker)
        except Unavailable as reason:
            row["absent"] = str(reason)
        rows[worker.name] = row
    right = gate(rows, case)
    times = paired(able, rounds, host) if right else {}
    busy_times = {}
    if times and busy_processes:
        with busy(busy_processes):
            busy_times = paired(able, rounds, host)
    for name, row in rows.items():
        row["right"] = right
        if name not in times:
            continue
        row |= summary(times[name])
        row["gflops"] = work / (row["median_ms"] * 1e6)
        if OURS in times and name != OURS:
            row |= speedup(times[name], times[OURS])
        if name in busy_times:
            row |= {"busy_processes": busy_processes, "busy_ms": summary(busy_times[name])["median_ms"]}
    return list(rows.values())


# Of float32 whose factors are sums of two bfloat16, or one.
UNITS = {"float32-high": 2.0**-15, "float32-medium": 2.0**-8}


def gate(rows: dict[str, dict[str, Any]], case: Case) -> bool:
    """No time is reported of a result whose error is more than twice torch.nn's own, and two units of rounding.

    In float64 torch.nn is what errors are taken against; there the floor is 16 units.
    """
    own = rows.get(OWN, {}).get("errors")
    unit = UNITS.get(case.dtype) or torch.finfo(case.torch_dtype).eps
    eps = (16 if case.dtype == "float64" else 2) * unit
    ours = [rows[name]["errors"] for name in rows if name.startswith(OURS) and "errors" in rows[name]]
    if own is None:  # nothing to compare with: what any dtype's rounding could explain
        return all(error <= 64 * eps for errors in ours for error in errors)
    return all(error <= 2 * bound + eps for errors in ours for error, bound in zip(errors, own, strict=True))


def title(case: Case) -> str:
    return f"{case.problem:11}{case.cell:5}{case.mode:6}{case.layout:7}{case.dtype:9}"


def show(case: Case, rows: list[dict[str, Any]]) -> None:
    """One line a case: every contender's median, its peak of memory, and how much faster we are."""
    if not rows[0]["right"]:
        print(f"{title(case)} WRONG: relative errors {said_errors(rows)}", flush=True)
        return
    texts = []
    for row in rows:
        if "median_ms" in row:
            text = f"{row['contender']} {row['median_ms']:.3f} ms {row['memory_bytes'] / 1e6:.1f} MB"
            text += f" ({verdict(row)})" if "speedup" in row else ""
            texts.append(f"{text} busy {row['busy_ms']:.3f} ms" if "busy_ms" in row else text)
    print(title(case), "  ".join(texts), flush=True)


def said_errors(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['contender']} {row['errors']}" for row in rows if "errors" in row)


def verdict(row: dict[str, Any]) -> str:
    """How many times as fast ours is; "=" where the difference is smaller than the spread, if that is known."""
    low, high = (row[name] or row["speedup"] for name in ("speedup_low", "speedup_high"))
    same = low <= 1 <= high or abs(row["speedup"] - 1) < INDIFFERENCE
    return f"{'=' if same else ''}{row['speedup']:.2f}x"
