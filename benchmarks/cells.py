"""`python -m benchmarks cells`: options of cells (docs/cells.md), beside none and beside loops of torch operations."""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import beside, kernels, record, require
from benchmarks.cases import CASES, Case
from benchmarks.contenders import MAX_UNROLLED, OURS, OWN, Unavailable, data, errors, optional, prepared, weights
from benchmarks.models import Contender
from benchmarks.options import add_conditions, check_device
from benchmarks.problems import Problem
from benchmarks.record import Row, newest

SIZES = {
    "charlm": Problem(200, 32, 128, 256),
    "news": Problem(50, 32, 100, 128),
    "short": Problem(20, 32, 100, 128),  # which a compiler writes out step by step
    "blocks": Problem(64, 16, 512, 512),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "zoneout": {"zoneout": 0.1},
    "recurrent": {"recurrent_dropout": 0.2},
    "candidate": {"candidate_dropout": 0.2},
    "input": {"input_dropout": 0.2},
    "weight": {"weight_dropout": 0.3},
    "norm": {"layer_norm": True},
    "gates": {"layer_norm": "gates"},
    "blocks": {"blocks": 8},
}
WITHOUT, LOOP, COMPILED = "no option", "loop of torch", "torch.compile of the loop"
DREAMER = "DreamerV3BlockGRU of TorchRL"


def layer_of(case: Case, option: str | None) -> Any:
    problem, options = case.shape, OPTIONS[option] if option else {}
    torch.manual_seed(0)
    layer = getattr(require("seqkernels"), case.cell)(problem.I, problem.H, problem.layers, **options)
    if "blocks" not in options:
        layer.load_state_dict(weights(case).state_dict())
    return layer.train(case.mode == "train")


def seeded(layer: Callable[[Any], tuple]) -> Callable[[Any], tuple]:
    """Every run draws the same masks, so that all contenders compute the same."""

    def call(x: Any) -> tuple:
        torch.manual_seed(1)
        return layer(x)

    return call


def ours(case: Case, option: str | None) -> Callable[[], list[Tensor]]:
    layer = layer_of(case, option)
    return prepared(case, layer, seeded(layer))


class Loop(nn.Module):
    """The layer step by step: aten's operations, the products of the input with all steps in one."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, masks: Any) -> tuple[Tensor, Any]:
        steps = require("seqkernels").backends.torch_steps
        layer, options = self.layer, self.layer.cell_options
        variant = steps.Variant(options.layer_norm, options.blocks, *masks[1:])
        h_0 = x.new_zeros(1, x.shape[1], layer.hidden_size)
        rows = x if masks.input is None else x * masks.input
        of_weights, c_0 = list(layer._weights()), h_0 if layer.mode == "LSTM" else None
        rows = rows.reshape(-1, x.shape[2])
        y, *end = steps.forward(layer.mode.lower(), rows, of_weights, layer._norms(), h_0, c_0, None, variant)
        return y.view(*x.shape[:2], -1), tuple(end) if layer.mode == "LSTM" else end[0]


def loop(case: Case, option: str, compiled: bool = False) -> Callable[[], list[Tensor]]:
    if "weight_dropout" in OPTIONS[option]:
        raise Unavailable("a plain layer with other weights")
    if compiled and case.shape.T > MAX_UNROLLED:
        raise Unavailable(f"torch.compile writes a loop out step by step; {case.shape.T} of them take it minutes")
    draw = require("seqkernels").cell_options.draw
    layer = layer_of(case, option)
    module = Loop(layer)
    if compiled:
        module.compile()

    def call(x: Tensor) -> tuple:
        state = x.new_zeros(1, x.shape[1], layer.hidden_size)
        has_c = state if layer.mode == "LSTM" else None
        return module(x, draw(layer.cell_options, layer.training, x.flatten(0, 1), state, has_c))

    return prepared(case, layer, seeded(call))


def dreamer(case: Case) -> Callable[[], list[Tensor]]:
    """Blocks as Dreamer v3 has them, in a cell that does more: a layer of blocks, with its norm, before the gates."""
    problem, modules = case.shape, optional("torchrl.modules").modules
    layer = modules.DreamerV3BlockGRU(problem.I, problem.H, projection_size=problem.H, num_blocks=8)
    return prepared(case, layer, lambda x: layer(x.transpose(0, 1)))


def contenders(case: Case, option: str) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    made = {
        WITHOUT: lambda: ours(case, None),
        OURS: lambda: ours(case, option),
        LOOP: lambda: loop(case, option),
        COMPILED: lambda: loop(case, option, compiled=True),
    }
    return made | ({DREAMER: lambda: dreamer(case)} if option == "blocks" and case.cell == "GRU" else {})


def add_options(parser: argparse.ArgumentParser) -> None:
    def choices(name: str, values: Sequence[str], text: str) -> None:
        parser.add_argument(name, nargs="+", default=list(values), choices=values, metavar="NAME", help=text)

    of_options = ("--size", tuple(SIZES)), ("--cell", ("GRU", "LSTM")), ("--mode", CASES["mode"])
    for name, values in (*of_options, ("--option", tuple(OPTIONS))):
        choices(name, values, ", ".join(values))
    add_conditions(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result of ours was wrong."""
    check_device(options.device)
    torch.set_num_threads(options.threads)
    return beside.run(
        options,
        "cells",
        cases_of(options),
        lambda case, more: measure(case, more["option"], options.rounds),
        lambda case, more: f"{kernels.title(case)} {more['option']:10}",
    )


def cases_of(options: argparse.Namespace) -> Iterator[tuple[Case, Row]]:
    for case, option in itertools.product(beside.cases(options, SIZES), options.option):
        plan = str(require("seqkernels").explain(layer_of(case, option).to(case.device), data(case).to(case.device)))
        yield case, {"option": option, "plan": plan}


def measure(case: Case, option: str, rounds: int) -> list[Row]:
    """A row for each contender."""
    expected = functools.cache(lambda: ours(case._replace(dtype="float64"), option)())

    def errors_of(name: str, contender: Contender) -> list[float] | None:
        # Others compute something else, or draw other masks.
        return None if name in (WITHOUT, COMPILED, DREAMER) else errors(contender.run(), expected())

    def is_right(rows: dict[str, Row]) -> bool:
        # The loop stands for torch.nn, which has no such layer.
        return kernels.gate(rows | ({OWN: rows[LOOP]} if "errors" in rows[LOOP] else {}), case)

    return beside.measure(case, contenders(case, option), errors_of, is_right, rounds)


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor and number of threads."""
    known = (row for row in rows if row["right"] and "median_ms" in row)
    rows = newest(known, lambda row: (*record.key(row), row["option"]))
    of, place = ("device", "cpu", "gpu", "threads"), ("problem", "cell", "mode", "option")
    for group, headings, lines in beside.grouped(rows, of, place, (WITHOUT, OURS, LOOP, COMPILED, DREAMER)):
        notes = ["Median ms: how many times as fast ours with the option is; = within the spread."]
        yield f"Options of cells, float32, {beside.where(*group)}", headings, lines, notes
