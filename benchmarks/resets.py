"""`python -m benchmarks resets`: masks inside of sequences, beside no masks, torch.nn between marks, and TorchRL."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import beside, kernels, record, require
from benchmarks.cases import CASES, Case
from benchmarks.contenders import OURS, OWN, Unavailable, errors, module_of, optional, prepared, weights
from benchmarks.models import Contender
from benchmarks.options import add_conditions, check_device, probability
from benchmarks.problems import Problem
from benchmarks.record import Row, newest

SIZES = {  # rollouts
    "rollout": Problem(128, 128, 256, 256),  # of TorchRL's own benchmark
    "short": Problem(32, 64, 64, 128),
}
SHARE = 0.03  # of steps that are marked
WITHOUT = "no mask"
TORCHRL = ("pad", "scan", "triton")


def mask_of(case: Case, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.rand(case.shape.T, case.shape.B, generator=generator) < share).to(case.device)


def ours(case: Case, mask: Tensor | None) -> Callable[[], list[Tensor]]:
    module = module_of(case, require("seqkernels"))
    module.load_state_dict(weights(case).state_dict())
    return prepared(case, module, lambda x: module(x, reset=mask))


def torch_nn(case: Case, mask: Tensor) -> Callable[[], list[Tensor]]:
    """The loop that training code has: torch.nn's layer from one step with a mark in any sequence to the next."""
    module = weights(case)
    steps = [0, *(t for t in mask.any(1).nonzero().flatten().tolist() if t), len(mask)]

    def call(x: Tensor) -> tuple[Tensor, Any]:
        state = tuple(x.new_zeros(1, x.shape[1], case.shape.H) for _ in range(2 if case.cell == "LSTM" else 1))
        outputs = []
        for start, stop in itertools.pairwise(steps):
            state = tuple(s.masked_fill(mask[start].unsqueeze(1), 0) for s in state)
            y, end = module(x[start:stop], state if case.cell == "LSTM" else state[0])
            state = end if isinstance(end, tuple) else (end,)
            outputs.append(y)
        return torch.cat(outputs), state if case.cell == "LSTM" else state[0]

    return prepared(case, module, call)


def torchrl(case: Case, mask: Tensor, backend: str) -> Callable[[], list[Tensor]]:
    """TorchRL's module, whose batch comes first, and which reads and writes the states of all steps."""
    if backend == "triton" and case.device == "cpu":
        raise Unavailable("on a GPU only")
    modules, tensordict = optional("torchrl.modules").modules, optional("tensordict")
    states = ["h", "c"][: 2 if case.cell == "LSTM" else 1]
    problem = case.shape
    try:
        module = getattr(modules, f"{case.cell}Module")(
            problem.I,
            problem.H,
            in_keys=["x", *states],
            out_keys=["y", *(("next", state) for state in states)],
            recurrent_backend=backend,
            default_recurrent_mode=True,
        )
    except (NotImplementedError, ImportError) as error:
        raise Unavailable(str(error)) from error
    layer: nn.Module = next(m for m in module.modules() if isinstance(m, nn.RNNBase))
    layer.load_state_dict(weights(case).state_dict())
    is_init = mask.t().unsqueeze(2)
    zeros = torch.zeros(problem.B, problem.T, 1, problem.H, device=case.device)

    def call(x: Tensor) -> tuple[Tensor, Any]:
        given = {"x": x.transpose(0, 1), "is_init": is_init, **dict.fromkeys(states, zeros)}
        found = module(tensordict.TensorDict(given, [problem.B, problem.T]))
        ends = tuple(found["next", state][:, -1].transpose(0, 1) for state in states)
        return found["y"].transpose(0, 1), ends if len(ends) == 2 else ends[0]

    return prepared(case, module, call)


def contenders(case: Case, share: float) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    mask = mask_of(case, share)
    made = {WITHOUT: lambda: ours(case, None), OURS: lambda: ours(case, mask), OWN: lambda: torch_nn(case, mask)}
    return made | {f"torchrl {b}": lambda b=b: torchrl(case, mask, b) for b in TORCHRL}


def add_options(parser: argparse.ArgumentParser) -> None:
    def choices(option: str, values: Sequence[str], text: str) -> None:
        parser.add_argument(option, nargs="+", default=list(values), choices=values, metavar="NAME", help=text)

    for option, values in (("--size", tuple(SIZES)), ("--cell", ("GRU", "LSTM")), ("--mode", CASES["mode"])):
        choices(option, values, ", ".join(values))
    parser.add_argument(
        "--share", type=probability, default=SHARE, metavar="P", help="of steps that are marked (%(default)s)"
    )
    add_conditions(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every case asked for; 1 if a result of ours was wrong."""
    check_device(options.device)
    torch.set_num_threads(options.threads)
    cases = ((case, {"share": options.share}) for case in beside.cases(options, SIZES))
    return beside.run(options, "resets", cases, lambda case, _: measure(case, options.share, options.rounds))


def measure(case: Case, share: float, rounds: int) -> list[Row]:
    """A row for each contender."""
    expected = torch_nn(case._replace(dtype="float64"), mask_of(case, share))()

    def errors_of(name: str, contender: Contender) -> list[float] | None:
        return None if name == WITHOUT else errors(contender.run(), expected)  # which computes something else

    return beside.measure(case, contenders(case, share), errors_of, lambda rows: kernels.gate(rows, case), rounds)


def tables(rows: list[Row]) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """Title, headings, lines and notes, for each processor, number of threads and share of marks."""
    known = (row for row in rows if row["right"] and "median_ms" in row)
    rows = newest(known, lambda row: (*record.key(row), row["share"]))
    order = (WITHOUT, OURS, OWN, *(f"torchrl {backend}" for backend in TORCHRL))
    of = "device", "cpu", "gpu", "threads", "share"
    for (*place, share), headings, lines in beside.grouped(rows, of, ("problem", "cell", "mode"), order):
        notes = ["Median ms: how many times as fast ours with the mask is; = within the spread."]
        yield f"Resets at {share:.0%} of the steps, float32, {beside.where(*place)}", headings, lines, notes
