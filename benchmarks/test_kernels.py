"""The problems of `problems.py` under pytest-benchmark, for those who know its tables: `make bench`.

A group is a problem, its cell and how it is run; in a group, contenders. All run in this one process, where a library
that keeps its threads spinning slows the next: `python -m benchmarks kernels` gives each a process of its own.
"""

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install seqkernels[benchmarks]")

from benchmarks import InputError, kernels, problems
from benchmarks.contenders import CASES, CONTENDERS, Case, Unavailable, errors, torch_nn
from benchmarks.problems import PROBLEMS, lengths

NAMES = ("torch.nn", "seqkernels")
THREADS = torch.get_num_threads()


def cases() -> list[Case]:
    return [
        Case(name, cell, mode, layout, "float32", THREADS, "cpu", PROBLEMS[name])
        for name in (*problems.USUAL, "names-real", "news-real")
        for cell in CASES["cell"]
        for mode in CASES["mode"]
        for layout in CASES["layout"]
        if PROBLEMS[name].T > 1 or (mode, layout) == ("infer", "padded")
    ]


@pytest.mark.parametrize("contender", NAMES)
@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(case[:4]))
def test_kernel(benchmark, case: Case, contender: str) -> None:
    benchmark.group = " ".join(case[:4])
    benchmark.extra_info.update(case.shape._asdict(), dtype=case.dtype, threads=case.threads)
    try:
        lengths(case.shape)
        run = CONTENDERS[contender](case)
    except (InputError, Unavailable) as reason:
        pytest.skip(str(reason))
    right = torch_nn(case._replace(dtype="float64"))()
    rows = {name: {"errors": errors(CONTENDERS[name](case)(), right)} for name in {"torch.nn", contender}}
    assert kernels.gate(rows, case), f"wrong results are not timed: {rows}"
    benchmark(run)
