"""The choice of a backend as a table: problems and machines, those that are not here as well."""

import pytest
import torch
from gpus import GPUS

from seqkernels.hardware import Machine
from seqkernels.select import BACKENDS, Problem, plan

HERE = Machine()
TRITON = Machine(triton=True)
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
    ("cuda", torch.float32, False, TRITON, "triton"),
    ("cuda", torch.bfloat16, False, TRITON, "triton"),
    ("cuda", torch.float16, False, TRITON, "triton"),
    ("cuda", torch.float64, False, TRITON, "torch_eager"),
    ("cuda", torch.float32, True, TRITON, "torch_eager"),
    ("cpu", torch.float32, False, TRITON, "cpu"),
    ("cpu", torch.float32, False, PURE._replace(triton=True), "torch_eager"),
    # Triton's interpreter is for tests: nobody gets it unasked.
    ("cpu", torch.float32, False, PURE._replace(triton=True, interpreter=True), "torch_eager"),
    ("cuda", torch.float32, False, Machine(triton=True, interpreter=True), "torch_eager"),
    ("xpu", torch.float32, False, TRITON, "torch_eager"),
    ("meta", torch.float32, False, HERE, "torch_eager"),
    ("cpu", torch.float8_e4m3fn, False, HERE, "torch_eager"),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_plan(row):
    device, dtype, transformed, machine, backend = row
    chosen = plan(Problem("gru", device, dtype, transformed), machine)
    assert chosen.backend == backend
    assert [refused for refused, _ in chosen.refusals] == list(BACKENDS[: BACKENDS.index(backend)])
    assert all(reason for _, reason in chosen.refusals)


def test_a_forced_backend_runs_or_is_refused_with_its_reason():
    problem = Problem("gru", "cpu", torch.float32)
    assert plan(problem, HERE, "torch_eager").backend == "torch_eager"
    assert plan(problem, Machine(forced_backend="torch_eager")).reason == "forced"
    with pytest.raises(ValueError, match="no compiled part"):
        plan(problem, PURE, "cpu")
    with pytest.raises(ValueError, match="tensors are on cuda"):
        plan(Problem("gru", "cuda", torch.float32), HERE, "cpu")
    with pytest.raises(ValueError, match="choose one of cpu, cuda, triton, torch_eager"):
        plan(problem, Machine(forced_backend="gpu"))


HALF, SINGLE = torch.bfloat16, torch.float32
ON_GPUS = [
    # cell, hidden size, projected, dtype, TF32, and the widest tile on: A100, L4, laptop, H200, B200, MI300X
    ("gru", 10, False, SINGLE, True, (32, 32, 32, 32, 32, 32)),
    ("gru", 112, False, HALF, True, (128, 0, 0, 128, 128, 128)),  # 98 KB of weights
    ("gru", 100, False, HALF, True, (0, 0, 0, 128, 128, 128)),  # odd sizes take more registers
    ("lstm", 128, False, HALF, True, (128, 0, 0, 128, 128, 128)),  # 128 KB
    ("rnn_tanh", 128, False, HALF, True, (128, 128, 128, 128, 128, 128)),
    ("gru", 64, False, SINGLE, True, (64, 64, 64, 64, 64, 64)),
    ("gru", 100, False, SINGLE, True, (0, 0, 0, 128, 0, 0)),  # 192 KB
    ("lstm", 64, False, SINGLE, True, (0, 0, 0, 64, 64, 64)),
    ("lstm", 65, False, SINGLE, True, (0, 0, 0, 0, 0, 0)),
    ("gru", 32, False, SINGLE, False, (32, 32, 32, 32, 32, 32)),
    ("gru", 33, False, SINGLE, False, (0, 0, 0, 0, 0, 64)),  # AMD's matrix cores take float32 as it is
    ("gru", 129, False, HALF, True, (0, 0, 0, 0, 0, 0)),
    ("lstm", 32, True, HALF, True, (0, 0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize("row", ON_GPUS, ids=str)
def test_the_road_on_gpus_that_are_not_here(row):
    cell, hidden, projected, dtype, tf32, widths = row
    gpus = [gpu for gpu in GPUS.values() if gpu.target != "sm_75"]
    for gpu, units in zip(gpus, widths, strict=True):
        problem = Problem(cell, "cuda", dtype, False, hidden, projected, tf32 and not gpu.amd)
        chosen = plan(problem, TRITON._replace(gpu=gpu))
        assert chosen.backend == "triton"
        assert chosen.kernel.startswith(f"resident, 16 sequences by {units} units" if units else "stepwise"), gpu
        assert chosen.kernel in str(chosen)


def test_what_has_no_triton_says_how_to_get_it():
    assert "pip install triton" in str(plan(Problem("gru", "cuda", SINGLE), HERE))
    t4 = plan(Problem("gru", "cuda", SINGLE), TRITON._replace(gpu=GPUS["Tesla T4"]))
    assert t4.backend == "torch_eager" and "compute capability 8.0" in str(t4)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        plan(Problem("gru", "cpu", SINGLE), TRITON, "triton")
    assert plan(Problem("gru", "cpu", SINGLE), Machine(triton=True, interpreter=True), "triton").backend == "triton"


def test_no_gpu_gives_the_cpu_its_kernels():
    chosen = plan(Problem("gru", "cpu", SINGLE, False, 128), TRITON)
    assert (chosen.backend, chosen.kernel) == ("cpu", "")


def test_a_dtype_that_no_backend_takes_is_refused():
    with pytest.raises(ValueError, match="is no floating dtype"):
        plan(Problem("gru", "cpu", torch.complex64), HERE)
