"""The choice of a backend as a table: problems and machines, those that are not here as well."""

import pytest
import torch

from seqkernels.hardware import Machine
from seqkernels.select import Problem, plan

HERE = Machine()
PURE = Machine(native=False, native_missing="this install has no compiled part")
TABLE = [
    # device, dtype, transformed, machine, backend
    ("cpu", torch.float32, False, HERE, "cpu"),
    ("cpu", torch.float64, False, HERE, "cpu"),
    ("cpu", torch.bfloat16, False, HERE, "cpu"),
    ("cpu", torch.float16, False, HERE, "cpu"),
    ("cpu", torch.float32, True, HERE, "torch_eager"),
    ("cpu", torch.float32, False, PURE, "torch_eager"),
    ("cuda", torch.float32, False, HERE, "torch_eager"),
    ("meta", torch.float32, False, HERE, "torch_eager"),
    ("cpu", torch.float8_e4m3fn, False, HERE, "torch_eager"),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_plan(row):
    device, dtype, transformed, machine, backend = row
    chosen = plan(Problem("gru", device, dtype, transformed), machine)
    assert chosen.backend == backend
    assert [refused for refused, _ in chosen.refusals] == ([] if backend == "cpu" else ["cpu"])
    assert all(reason for _, reason in chosen.refusals)


def test_a_forced_backend_runs_or_is_refused_with_its_reason():
    problem = Problem("gru", "cpu", torch.float32)
    assert plan(problem, HERE, "torch_eager").backend == "torch_eager"
    assert plan(problem, Machine(forced_backend="torch_eager")).reason == "forced"
    with pytest.raises(ValueError, match="no compiled part"):
        plan(problem, PURE, "cpu")
    with pytest.raises(ValueError, match="tensors are on cuda"):
        plan(Problem("gru", "cuda", torch.float32), HERE, "cpu")
    with pytest.raises(ValueError, match="choose one of cpu, torch_eager"):
        plan(problem, Machine(forced_backend="gpu"))


def test_a_dtype_that_no_backend_takes_is_refused():
    with pytest.raises(ValueError, match="is no floating dtype"):
        plan(Problem("gru", "cpu", torch.complex64), HERE)
