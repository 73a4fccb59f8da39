"""`python -m benchmarks kernels`: one layer beside its contenders, checked first, then timed in turn."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.contenders import Case, Unavailable, add_case_options, explain, versions
from benchmarks.options import positive
from benchmarks.problems import PROBLEMS, flops
from benchmarks.timing import Worker, paired, peak_gflops, speedup, summary

QUICK_TURNS = 3


def turns(text: str) -> int:
    if (number := positive(text)) < 2:
        raise argparse.ArgumentTypeError("must be at least 2, or there is no spread to judge by")
    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    add_case_options(parser)
    parser.add_argument("--turns", type=turns, default=12, metavar="N", help="blocks of each contender (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TURNS} blocks of each contender")
    parser.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="for the result rows (benchmarks/results)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result was wrong."""
    problems = list(PROBLEMS) if "all" in options.problem else options.problem
    axes = options.threads, options.dtype, options.mode, options.layout, options.cell, problems
    failed = False
    for threads, group in itertools.groupby(itertools.product(*axes), key=lambda axis: axis[0]):
        peak = peak_gflops(threads)
        print(f"threads: {threads}; peak:", f"{peak:.0f} GFLOP/s" if peak else "not known without compiled kernels")
        for _, dtype, mode, layout, cell, problem in group:
            if layout == "packed" and (mode == "infer" or PROBLEMS[problem].T == 1):
                continue
            if mode == "train" and PROBLEMS[problem].T == 1:
                continue
            row = measure(Case(problem, cell, mode, layout, dtype, threads), options, peak)
            failed |= not row["right"]
            record.append(options.out / "kernels.jsonl", row)
            show(row)
    print(f"Rows: {options.out / 'kernels.jsonl'}")
    return int(failed)


def measure(case: Case, options: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    workers, absent, figures = [], {}, {}
    for name in options.contender:
        worker = Worker(name, case)
        try:
            figures[name] = {"errors": worker.ask("errors"), "memory_bytes": worker.ask("memory")}
            workers.append(worker)
        except Unavailable as reason:
            absent[name] = str(reason)
            worker.stop()
    right = gate(figures, case)
    try:
        blocks = paired(workers, QUICK_TURNS if options.quick else options.turns) if right else {}
    finally:
        for worker in workers:
            worker.stop()
    for name, seconds in blocks.items():
        figures[name] |= summary(seconds) | {"version": versions(name)}
        if "seqkernels" in blocks and name != "seqkernels":
            figures[name]["speedup"] = speedup(seconds, blocks["seqkernels"])
        figures[name]["gflops"] = flops(PROBLEMS[case.problem], case.cell, case.mode, case.layout) / (
            figures[name]["median_ms"] * 1e6
        )
    return {
        "benchmark": "kernels",
        **case._asdict(),
        "shape": PROBLEMS[case.problem]._asdict(),
        **record.environment(),
        "threads": case.threads,
        "peak_gflops": peak,
        "plan": explain(case),
        "right": right,
        "contenders": figures,
        "absent": absent,
    }


def gate(figures: dict[str, dict[str, Any]], case: Case) -> bool:
    """No time is reported of a result whose error is more than twice torch.nn's own, and two units of rounding."""
    if "seqkernels" not in figures or "torch.nn" not in figures:
        return True
    eps = (16 if case.dtype == "float64" else 2) * torch.finfo(getattr(torch, case.dtype)).eps
    pairs = zip(figures["seqkernels"]["errors"], figures["torch.nn"]["errors"], strict=True)
    return all(ours <= 2 * own + eps for ours, own in pairs)


def show(row: dict[str, Any]) -> None:
    """One line a case: every contender's median, and how much faster we are."""
    name = f"{row['problem']:9}{row['cell']:5}{row['mode']:6}{row['layout']:7}{row['dtype']:9}"
    if not row["right"]:
        print(f"{name} WRONG: errors {row['contenders']['seqkernels']['errors']}", flush=True)
        return
    ours = row["contenders"].get("seqkernels")
    texts = []
    for contender, figures in row["contenders"].items():
        text = f"{contender} {figures['median_ms']:.3f} ms"
        texts.append(f"{text} ({compared(figures['speedup'])})" if "speedup" in figures else text)
    print(name, "  ".join(texts), *(["GFLOP/s:", f"{ours['gflops']:.0f}"] if ours else []), flush=True)


def compared(speedup: dict[str, float]) -> str:
    """How much faster we are; "=" where the difference is smaller than the spread."""
    same = abs(speedup["median"] - 1) < speedup["q3"] - speedup["q1"]
    return f"{'=' if same else ''}{speedup['median']:.2f}x"
