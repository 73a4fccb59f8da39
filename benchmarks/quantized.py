"""`python -m benchmarks quantized`: int8 layers on a CPU, beside float32, bfloat16, and torch.ao's quantize_dynamic."""

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kernels, record, require
from benchmarks.cases import Case
from benchmarks.contenders import OURS, OWN, Unavailable, errors, prepared, seqkernels, torch_nn, weights
from benchmarks.models import Contender
from benchmarks.options import add_out, round_count, thread_count
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.record import Row, newest, ordered
from benchmarks.timing import paired, speedup, summary

SIZES = {name: PROBLEMS[name] for name in ("step", "names", "news", "charlm", "charlm1", "big")}
SIZES["step512"] = Problem(1, 1, 512, 512)
CELLS = ("GRU", "LSTM", "RNN")
INT8, BFLOAT16, AO = "seqkernels int8", "seqkernels bfloat16", "torch.ao int8"
MOST = 0.05  # relative error: int8 is no more exact than some per cent


def ours(case: Case) -> Callable[[], list[Tensor]]:
    sk, module = require("seqkernels"), weights(case)
    sk.swap_in(module)
    sk.quantize_(module)
    return prepared(case, module)


def torch_ao(case: Case) -> Callable[[], list[Tensor]]:
    if case.cell == "RNN":
        raise Unavailable("it has no RNN")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        from torch.ao.quantization import quantize_dynamic

        try:
            module = quantize_dynamic(nn.Sequential(weights(case)), {getattr(nn, case.cell)}, dtype=torch.qint8)[0]
        except RuntimeError as error:  # no engine of its own for this processor
            raise Unavailable(str(error)) from error
    return prepared(case, module)


CONTENDERS: dict[str, Callable[[Case], Callable[[], list[Tensor]]]] = {
    INT8: ours,
    OURS: seqkernels,
    BFLOAT16: lambda case: seqkernels(case._replace(dtype="bfloat16")),
    AO: torch_ao,
    OWN: torch_nn,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    for option, values in (("--size", tuple(SIZES)), ("--cell", CELLS)):
        parser.add_argument(
            option, nargs="+", default=list(values), choices=values, metavar="NAME", help=", ".join(values)
        )
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--rounds", type=round_count, default=15, metavar="N", help="of all contenders (%(default)s)")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result of ours was wrong."""
    torch.set_num_threads(options.threads)
    require("seqkernels")  # so that the first row knows the instruction set
    file, started, failed = options.out / "quantized.jsonl", record.environment()["time"], False
    for cell, size in itertools.product(options.cell, options.size):
        case = Case(size, cell, "infer", "padded", "float32", options.threads, "cpu", SIZES[size])
        common = {"benchmark": "quantized", "run": started, **kernels.facts(case)}
        rows = [common | row for row in measure(case, options.rounds)]
        record.append(file, *rows)
        failed |= not rows[0]["right"]
        print(f"{size:9}{cell:5}", "  ".join(map(said, rows)), flush=True)
    print(f"Rows: {file}")
    return int(failed)


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: its errors, whether those of int8 are small enough, and the times if so."""
    expected = torch_nn(case._replace(dtype="float64"))()
    rows, able = {}, []
    for name, make in CONTENDERS.items():
        row: dict[str, Any] = {"contender": name, "absent": None}
        try:
            contender = Contender(name, make(case))
            row["errors"] = errors(contender.run(), expected)
            able.append(contender)
        except Unavailable as reason:
            row["absent"] = str(reason)
        rows[name] = row
    right = max(rows[INT8]["errors"]) < MOST
    times = paired(able, rounds) if right else {}
    for name, row in rows.items():
        row["right"] = right
        if name in times:
            row |= summary(times[name]) | (speedup(times[name], times[INT8]) if name != INT8 else {})
    return list(rows.values())


def said(row: Row) -> str:
    if "median_ms" not in row:
        return f"{row['contender']} {'absent' if row['right'] else 'WRONG'}"
    faster = f" ({kernels.verdict(row)})" if "speedup" in row else ""
    return f"{row['contender']} {row['median_ms']:.3f} ms{faster}"


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor and number of threads."""
    rows = newest(row for row in rows if row["right"] and "median_ms" in row)
    for cpu, isa, threads in dict.fromkeys((row["cpu"], row["isa"], row["threads"]) for row in rows):
        by_case: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            if (row["cpu"], row["isa"], row["threads"]) == (cpu, isa, threads):
                by_case.setdefault((row["problem"], row["cell"]), {})[row["contender"]] = row
        names = ordered((name for found in by_case.values() for name in found), CONTENDERS)
        lines = [[" ".join(case), *(text(found.get(name)) for name in names)] for case, found in by_case.items()]
        notes = ["Median ms: how many times as fast int8 is; = within the spread."]
        yield (
            f"Quantized to int8, inference, {threads} thread{'s' * (threads != 1)} of {cpu} ({isa})",
            ["", *names],
            lines,
            notes,
        )


def text(row: Row | None) -> str:
    if row is None:
        return "-"
    faster = f": {kernels.verdict(row).removesuffix('x')}" if "speedup" in row else ""
    return f"{row['median_ms']:.3g}{faster}"
