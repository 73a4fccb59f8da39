"""`python -m benchmarks quantized`: int8 layers on a CPU, beside float32, bfloat16, and torch.ao's quantize_dynamic."""

import argparse
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import beside, require
from benchmarks.cases import Case
from benchmarks.contenders import OURS, OWN, Unavailable, errors, prepared, seqkernels, torch_nn, weights
from benchmarks.options import add_out, round_count, thread_count
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.record import Row, newest

SIZES = {name: PROBLEMS[name] for name in ("step", "names", "news", "charlm", "charlm1", "big")}
SIZES["step512"] = Problem(1, 1, 512, 512)
CELLS = ("GRU", "LSTM", "RNN")
INT8, BFLOAT16, AO = "seqkernels int8", "seqkernels bfloat16", "torch.ao int8"
MAX_ERROR = 0.05  # relative error: int8 is no more exact than some per cent


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
    cases: Iterator[tuple[Case, Row]] = (
        (Case(size, cell, "infer", "padded", "float32", options.threads, "cpu", SIZES[size]), {})
        for cell, size in itertools.product(options.cell, options.size)
    )
    return beside.run(
        options,
        "quantized",
        cases,
        lambda case, _: measure(case, options.rounds),
        lambda case, _: f"{case.problem:9}{case.cell:5}",
    )


def measure(case: Case, rounds: int) -> list[Row]:
    """A row for each contender; right are those of which int8's errors are small enough."""
    expected = torch_nn(case._replace(dtype="float64"))()
    return beside.measure(
        case,
        {name: functools.partial(make, case) for name, make in CONTENDERS.items()},
        lambda name, contender: errors(contender.run(), expected),
        lambda rows: max(rows[INT8]["errors"]) < MAX_ERROR,
        rounds,
        INT8,
    )


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor and number of threads."""
    rows = newest(row for row in rows if row["right"] and "median_ms" in row)
    for group, headings, lines in beside.grouped(rows, ("cpu", "isa", "threads"), ("problem", "cell"), CONTENDERS):
        cpu, isa, threads = group
        title = f"Quantized to int8, inference, {threads} thread{'s' * (threads != 1)} of {cpu} ({isa})"
        yield title, headings, lines, ["Median ms: how many times as fast int8 is; = within the spread."]
