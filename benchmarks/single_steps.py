"""`python -m benchmarks single-steps`: a step of a cell beside torch.nn's, in float32 and under autocast."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import beside, kernels, record, require
from benchmarks.cases import CASES, Case
from benchmarks.contenders import OURS, OWN, errors, inferring
from benchmarks.models import Contender
from benchmarks.options import add_conditions, check_device
from benchmarks.problems import CELLS, Problem
from benchmarks.record import Row, newest

SIZES = {f"{B}x{H}": Problem(1, B, H, H) for H in (256, 512, 1024) for B in (1, 8, 16, 64)}
AUTOCAST = "bfloat16"  # the region's dtype; all that is given is float32
DTYPES = ("float32", AUTOCAST)


def cell_of(case: Case, namespace: Any) -> Any:
    torch.manual_seed(0)
    own = getattr(nn, f"{case.cell}Cell")(case.shape.I, case.shape.H)
    cell = getattr(namespace, f"{case.cell}Cell")(case.shape.I, case.shape.H)
    cell.load_state_dict(own.state_dict())
    return cell


def step(case: Case, namespace: Any) -> Callable[[], list[Tensor]]:
    """A call of the cell, in training with a backward pass; under autocast in a region of its own."""
    problem, generator = case.shape, torch.Generator().manual_seed(1)
    dtype = torch.float32 if case.dtype == AUTOCAST else case.torch_dtype
    cell = cell_of(case, namespace).to(case.device, dtype)

    def given(features: int) -> Tensor:
        drawn = torch.randn(problem.B, features, generator=generator)
        return drawn.to(case.device, dtype).requires_grad_(case.mode == "train")

    x, *states = given(problem.I), *(given(problem.H) for _ in range(2 if case.cell == "LSTM" else 1))
    hx: Any = tuple(states) if case.cell == "LSTM" else states[0]
    of_gradient = torch.ones(problem.B, problem.H, device=case.device)

    def call() -> Sequence[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=case.dtype == AUTOCAST):
            results = cell(x, hx)
        return results if isinstance(results, tuple) else (results,)

    def train() -> list[Tensor]:
        cell.zero_grad()
        inputs = x, *states
        for tensor in inputs:
            tensor.grad = None
        results = call()
        torch.autograd.backward(results, [of_gradient.to(result.dtype) for result in results])
        return [*results, *(tensor.grad for tensor in (*inputs, *cell.parameters()))]

    return inferring(lambda: list(call())) if case.mode == "infer" else train


def add_options(parser: argparse.ArgumentParser) -> None:
    choices = ("--size", tuple(SIZES)), ("--cell", CELLS), ("--mode", CASES["mode"]), ("--dtype", DTYPES)
    for name, values in choices:
        text = ", ".join(values)
        parser.add_argument(name, nargs="+", default=list(values), choices=values, metavar="NAME", help=text)
    add_conditions(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result of ours was wrong."""
    check_device(options.device)
    torch.set_num_threads(options.threads)
    return beside.run(options, "single-steps", cases_of(options), lambda case, _: measure(case, options.rounds))


def cases_of(options: argparse.Namespace) -> Iterator[tuple[Case, Row]]:
    asked = itertools.product(options.dtype, options.mode, options.cell, options.size)
    for dtype, mode, cell, size in asked:
        yield Case(size, cell, mode, "cell", dtype, options.threads, options.device, SIZES[size]), {}


def measure(case: Case, rounds: int) -> list[Row]:
    """A row for either cell."""
    expected = functools.cache(step(case._replace(dtype="float64"), nn))
    made = {OWN: lambda: step(case, nn), OURS: lambda: step(case, require("seqkernels"))}

    def errors_of(_: str, contender: Contender) -> list[float]:
        return errors(contender.run(), expected())

    return beside.measure(case, made, errors_of, lambda rows: kernels.gate(rows, case), rounds)


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor, number of threads and dtype."""
    rows = newest((row for row in rows if row["right"]), record.key)
    of, place = ("dtype", "device", "cpu", "gpu", "threads"), ("cell", "mode", "problem")
    for (dtype, *group), headings, lines in beside.grouped(rows, of, place, (OWN, OURS)):
        notes = ["Median ms of BxH, as many features as units; how many times as fast ours is; = within the spread."]
        what = "float32 under autocast to bfloat16" if dtype == AUTOCAST else dtype
        yield f"One step of a cell, {what}, {beside.where(*group)}", headings, lines, notes
