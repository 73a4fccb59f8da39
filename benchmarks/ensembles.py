"""`python -m benchmarks ensembles`: layers of one kind by torch.vmap, beside a call for each of them."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from benchmarks import beside, kernels, require
from benchmarks.cases import CASES, Case
from benchmarks.contenders import OURS, OWN, data, errors, inferring, module_of
from benchmarks.models import Contender
from benchmarks.options import add_conditions, check_device, positive
from benchmarks.problems import Problem
from benchmarks.record import Row, key, newest

SIZES = {
    f"{T}x{B}": Problem(T, B, 64, 64) for T, B in ((1, 1), (5, 1), (10, 4), (20, 8), (50, 16))
}  # steps x sequences
MEMBERS = 16
EACH = f"{OURS}, a call each"
FUNCTION = f"{OURS}, the function"  # without functional_call


def layers_of(case: Case, namespace: Any, count: int) -> list[nn.Module]:
    """The members, of one set of weights in every namespace."""
    torch.manual_seed(0)
    states = [module_of(case, nn).state_dict() for _ in range(count)]
    layers = [module_of(case, namespace).to(case.device, case.torch_dtype) for _ in states]
    for layer, state in zip(layers, states, strict=True):
        layer.load_state_dict(state)
    return layers


def one_by_one(case: Case, namespace: Any, count: int) -> Callable[[], list[list[Tensor]]]:
    """A run: for each member the output and, in training, the gradients of its parameters."""
    layers, x = layers_of(case, namespace, count), input_of(case)

    @inferring
    def infer() -> list[list[Tensor]]:
        return [[layer(x)[0]] for layer in layers]

    def train() -> list[list[Tensor]]:
        results = []
        for layer in layers:
            layer.zero_grad()
            y = layer(x)[0]
            y.sum().backward()
            results.append([y, *(p.grad for p in layer.parameters())])
        return results

    return infer if case.mode == "infer" else train


def together(case: Case, count: int, of_function: bool = False) -> Callable[[], list[Tensor]]:
    """The same of all members side by side, by the layer or by its function."""
    layers, x = layers_of(case, require("seqkernels"), count), input_of(case)
    parameters, _ = stack_module_state(layers)
    weights = list(parameters.values())
    function = getattr(require("seqkernels").functional, case.cell.lower())
    of_layer = vmap(lambda parameters: functional_call(layers[0], parameters, (x,)))
    of_weights = vmap(lambda weights: function(x, None, weights))

    def run() -> Tensor:
        return (of_weights(weights) if of_function else of_layer(parameters))[0]

    @inferring
    def infer() -> list[Tensor]:
        return [run()]

    def train() -> list[Tensor]:
        for weight in weights:
            weight.grad = None
        y = run()
        y.sum().backward()
        return [y, *(weight.grad for weight in weights)]

    return infer if case.mode == "infer" else train


def input_of(case: Case) -> Tensor:
    return data(case).to(case.device, case.torch_dtype)


def side_by_side(results: list) -> list[Tensor]:
    if isinstance(results[0], Tensor):
        return results
    return [torch.stack(members) for members in zip(*results, strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    for option, values in (("--size", tuple(SIZES)), ("--cell", CASES["cell"]), ("--mode", CASES["mode"])):
        usual = ["GRU", "LSTM"] if option == "--cell" else list(values)
        parser.add_argument(option, nargs="+", default=usual, choices=values, metavar="NAME", help=", ".join(values))
    parser.add_argument("--members", type=positive, default=MEMBERS, metavar="N", help="layers (%(default)s)")
    add_conditions(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result of ours was wrong."""
    check_device(options.device)
    torch.set_num_threads(options.threads)
    cases = ((case, {"members": options.members}) for case in beside.cases(options, SIZES))
    return beside.run(options, "ensembles", cases, lambda case, _: measure(case, options.members, options.rounds))


def measure(case: Case, count: int, rounds: int) -> list[Row]:
    """A row for each contender."""
    expected = side_by_side(one_by_one(case._replace(dtype="float64"), nn, count)())
    made: dict[str, Callable[[], Callable[[], list]]] = {
        OURS: lambda: together(case, count),
        FUNCTION: lambda: together(case, count, True),
        EACH: lambda: one_by_one(case, require("seqkernels"), count),
        OWN: lambda: one_by_one(case, nn, count),
    }

    def errors_of(name: str, contender: Contender) -> list[float]:
        return errors(side_by_side(contender.run()), expected)

    return beside.measure(case, made, errors_of, lambda rows: kernels.gate(rows, case), rounds)


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor, number of threads and of members."""
    rows = newest((row for row in rows if row["right"]), lambda row: (*key(row), row["members"]))
    of, order = ("device", "cpu", "gpu", "threads", "members"), (OURS, FUNCTION, EACH, OWN)
    for (*place, members), headings, lines in beside.grouped(rows, of, ("problem", "cell", "mode"), order):
        notes = ["Median ms: how many times as fast the ensemble in one call is; = within the spread."]
        yield f"Ensembles of {members} layers, float32, {beside.where(*place)}", headings, lines, notes
