"""The problems of `problems.py` under pytest-benchmark, for those who know its tables: `make bench`.

A group is a problem, its cell and how it is run; in a group, contenders. All run in this one process, where a library
that keeps its threads spinning slows the next: `python -m benchmarks kernels` gives each a process of its own.
"""

import argparse

import pytest

pytest.importorskip("pytest_benchmark", reason="pip install seqkernels[benchmarks]")

from benchmarks import InputError, kernels, problems
from benchmarks.cases import Case, add_case_options, cases_of
from benchmarks.contenders import CONTENDERS, Unavailable, errors, torch_nn
from benchmarks.problems import lengths

NAMES = ("torch.nn", "seqkernels")


def cases() -> list[Case]:
    """Those of `kernels` without options, and the lengths of real data."""
    parser = argparse.ArgumentParser()
    add_case_options(parser)
    return list(cases_of(parser.parse_args(["--problem", *problems.USUAL, "names-real", "news-real"])))


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
