"""What is timed: the cases that the options of a command name."""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.options import thread_count
from benchmarks.problems import CELLS, PROBLEMS, USUAL, Problem

CASES = {
    "cell": CELLS,
    "mode": ("infer", "train"),
    "layout": ("padded", "packed"),
    "dtype": ("float32", "float32-high", "float32-medium", "bfloat16", "float16", "float64"),
}


class Case(NamedTuple):
    """What is timed: a problem, a cell, and how it is run."""

    problem: str
    cell: str  # GRU, LSTM, RNN
    mode: str  # infer, train
    layout: str  # padded, packed
    dtype: str  # float32, bfloat16, float16, float64; behind float32 torch's precision of its products, if not highest
    threads: int
    device: str
    shape: Problem

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype.partition("-")[0])

    def set_precision(self) -> None:
        """Tell torch the precision that the case asks for, of matrix products and of recurrent layers on a CPU."""
        precision = self.dtype.partition("-")[2] or "highest"
        torch.set_float32_matmul_precision(precision)
        of_rnn = {"highest": "none", "high": "tf32", "medium": "bf16"}[precision]
        torch.backends.mkldnn.rnn.fp32_precision = of_rnn  # type: ignore[attr-defined]


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """What cases to run; without --problem the usual ones."""

    def choices(option: str, values: Iterable[str], default: list[str], text: str) -> None:
        parser.add_argument(option, nargs="+", default=default, choices=list(values), metavar="NAME", help=text)

    choices("--problem", ["all", *PROBLEMS], [], f"{', '.join(PROBLEMS)}, all (usual: {' '.join(USUAL)})")
    for axis, values in CASES.items():
        usual = ["float32"] if axis == "dtype" else list(values)
        choices(f"--{axis}", values, usual, f"{', '.join(values)} (usual: {' '.join(usual)})")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--threads", nargs="+", type=thread_count, default=[torch.get_num_threads()], metavar="N", help="of a CPU"
    )


def cases_of(options: argparse.Namespace, usual: Sequence[str] = USUAL) -> Iterator[Case]:
    """Every case that the options ask for and that makes sense: a single step is neither trained nor packed."""
    problems = list(PROBLEMS) if "all" in options.problem else options.problem or usual
    for threads, dtype, mode, layout, cell, problem in itertools.product(
        options.threads, options.dtype, options.mode, options.layout, options.cell, problems
    ):
        if PROBLEMS[problem].T == 1 and (mode, layout) != ("infer", "padded"):
            continue
        yield Case(problem, cell, mode, layout, dtype, threads, options.device, PROBLEMS[problem])
