"""The CUDA kernels, run on the CPU: every road, cell and dtype, in random orders of threads and blocks; and the checks
themselves, by planted faults."""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from gpus import GPUS
from test_ops import CELLS, SHAPES, Call, assert_rounding_alone_of, both_passes

from seqkernels import select
from seqkernels.hardware import HERE

pytestmark = pytest.mark.skipif(not HERE.host_run, reason="no host run here: `make test` builds build/host_run")

ROADS = {"single block": 8, "single block of 2": 2, "stepwise": 0}


@pytest.fixture(scope="module")
def host_run():
    """Control of the runs: tests/host_run/run.h."""
    spec = importlib.util.spec_from_file_location("host_run", os.environ["SEQKERNELS_HOST_RUN"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.skip_barrier(-1)


def by_road(sequences: int, tf32: bool = False):
    """Both operators, which take `sequences` a block; 0: stepwise."""
    operators = torch.ops.seqkernels
    return (
        lambda *args: operators.cuda_forward(*args, tf32, sequences),
        lambda *args: operators.cuda_backward(*args, tf32, sequences),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("many rows", "deep", "long")])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("road", ROADS)
def test_every_road_errs_by_rounding_alone(road, cell, shape, dtype):
    call = Call(cell, dtype=dtype, **SHAPES[shape])
    if ROADS[road] and (call.hidden > 128 or dtype == torch.float64):
        pytest.skip("there is no single-block kernel for it")
    assert_rounding_alone_of(call, *by_road(ROADS[road]))


@pytest.mark.parametrize("hidden", [31, 64, 90, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_width_of_a_single_block(cell, dtype, hidden):
    call = Call(cell, 2, 9, 3, hidden, batch_sizes=(9, 5, 1), bias=False, dtype=dtype)
    assert_rounding_alone_of(call, *by_road(8))


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_rounds_factors_to_ten_bits(cell):
    call = Call(cell, 2, 5, 4, 40, dtype=torch.float32)
    exact, rounded = (both_passes(call, *by_road(8, tf32)) for tf32 in (False, True))
    # A relu input that rounds across zero has another gradient, which is no error.
    compared = slice(2) if cell == "rnn_relu" else slice(None)
    pairs = zip(rounded[compared], exact[compared], strict=True)
    gaps = [float((a - b).norm() / b.norm()) for a, b in pairs if b.numel()]
    assert 1e-5 < max(gaps) < 3e-3


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("cell", CELLS)
def test_no_order_of_threads_changes_a_bit(cell, road, host_run):
    call = Call(cell, 2, 11, 4, 33, batch_sizes=(11, 9, 9, 2), dtype=torch.float32)
    expected = both_passes(call, *by_road(ROADS[road]))
    for seed in range(5):
        host_run.seed(seed)
        for ours, first in zip(both_passes(call, *by_road(ROADS[road])), expected, strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("backward", "barrier"),
    [(False, 0), (False, 2), (True, 1)],
    ids=["before the first step", "a step forward", "a step backward"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_a_missing_barrier_is_caught(cell, backward, barrier, seed, host_run):
    call = Call(cell, 1, 3, 4, 40, dtype=torch.float32)
    forward, back = by_road(8)
    host_run.seed(seed)

    def faulty(run):
        def with_fault(*args):
            host_run.skip_barrier(barrier)
            try:
                return run(*args)
            finally:
                host_run.skip_barrier(-1)

        return with_fault

    with pytest.raises(RuntimeError, match=r"race|unwritten"):
        both_passes(call, forward if backward else faulty(forward), faulty(back) if backward else back)
    both_passes(call, forward, back)


def test_select_knows_which_layers_fit():
    gpus = {name: GPUS[name] for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA L4", "Tesla T4")}
    layer = "lstm", 128, False
    fits = {
        name: [
            select.single_block(*layer, dtype, tf32, gpu, backward)
            for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
            for backward in (False, True)
        ]
        for name, gpu in gpus.items()
    }
    assert fits == {
        "NVIDIA A100-SXM4-80GB": [True, True, True, False, False, False],
        "NVIDIA H200": [True] * 6,
        "NVIDIA L4": [True, True, False, False, False, False],
        "Tesla T4": [False] * 6,
    }
    assert not select.single_block("gru", 129, False, torch.bfloat16, False, gpus["NVIDIA H200"], False)
    assert not select.single_block("lstm", 64, True, torch.bfloat16, False, gpus["NVIDIA H200"], False)


def test_small_batches_are_spread_over_the_gpu():
    gpu = GPUS["NVIDIA H200"]
    assert [select.sequences_of_block(n, gpu) for n in (1, 132, 133, 1056, 5000)] == [1, 1, 2, 8, 8]


def test_dtypes_and_sizes_without_a_kernel_say_so():
    for call in (Call("gru", dtype=torch.float64), Call("gru", hidden=129, dtype=torch.float32)):
        with pytest.raises(RuntimeError, match="no single-block kernel"):
            both_passes(replace(call), *by_road(8))
