"""Run layers on the CUDA kernels, both passes: small ones that take every path, for compute-sanitizer, or problems of
the benchmarks, once, for a profiler.

    compute-sanitizer --tool racecheck python tests/cuda/gpu_run.py
    ncu python tests/cuda/gpu_run.py --problem charlm --cell LSTM --dtype bfloat16
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--problem", nargs="+", default=[], metavar="NAME", help="of benchmarks/problems.py")
parser.add_argument("--cell", nargs="+", default=["RNN", "GRU", "LSTM"])
parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16", "float64"])
parser.add_argument("--hidden", nargs="+", type=int, default=[31, 64, 100, 300, 800], help="of the small layers")
parser.add_argument("--emulator", type=Path, help="the library of an emulator: on the CPU, for trying this out")
options = parser.parse_args()
if options.emulator:
    os.environ["SEQKERNELS_EMULATOR"] = str(options.emulator)
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence  # noqa: E402

import seqkernels as sk  # noqa: E402
from benchmarks.problems import PROBLEMS, Problem, lengths  # noqa: E402

DEVICE = "cpu" if options.emulator else "cuda"


def both_passes(module: nn.Module, input, **how) -> None:
    data = input if isinstance(input, Tensor) else input.data
    y, _ = module(input, **how)
    y = y if isinstance(y, Tensor) else y.data
    grads = torch.autograd.grad(y, [data, *module.parameters()], torch.ones_like(y))
    for result in (y, *grads):
        assert result.isfinite().all(), module


def small(module: nn.Module) -> None:
    """Padded, and ragged both ways: sizes that the host knows, and sizes that only the GPU does."""
    x = torch.randn(6, 11, module.input_size).to(module.weight_hh_l0).requires_grad_()
    ragged = torch.tensor([6, 1, 3, 6, 2, 2, 5, 1, 4, 4, 1])
    both_passes(module, x)
    both_passes(module, pack_padded_sequence(x, ragged, enforce_sorted=False))
    both_passes(module, x, lengths=ragged.to(DEVICE) - 1)


def once(module: nn.Module, problem: Problem) -> None:
    x = torch.randn(problem.T, problem.B, problem.I).to(module.weight_hh_l0).requires_grad_()
    both_passes(module, x)
    both_passes(module, pack_padded_sequence(x, lengths(problem), enforce_sorted=False))


def modules(cell: str) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """The layers to run, and how each is run."""
    for name in options.problem:
        problem = PROBLEMS[name]
        yield getattr(sk, cell)(problem.I, problem.H, problem.layers), functools.partial(once, problem=problem)
    if options.problem:
        return
    others = {"RNN": [{"nonlinearity": "relu"}], "LSTM": [{"proj_size": 9}]}.get(cell, [])
    for hidden, kind in itertools.product(options.hidden, [{}, *others]):
        yield getattr(sk, cell)(7, hidden, bidirectional=True, **kind), small
    masks = {"recurrent_dropout": 0.3} | ({} if cell == "RNN" else {"candidate_dropout": 0.3, "zoneout": 0.2})
    for hidden in (31, 300):
        yield getattr(sk, cell)(7, hidden, bidirectional=True, **masks), small


def main() -> None:
    torch.manual_seed(0)
    count = 0
    for dtype, cell in itertools.product(options.dtype, options.cell):
        for module, run in modules(cell):
            module = module.to(DEVICE, getattr(torch, dtype))
            module.backend = "cuda"
            for tf32 in (False, True) if dtype == "float32" and DEVICE == "cuda" else (False,):
                torch.backends.cudnn.allow_tf32 = tf32
                run(module)
                count += 1
    print(f"{count} layers ran")


if __name__ == "__main__":
    main()
