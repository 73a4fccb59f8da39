"""Every backend against the float64 specification: outputs, final states and all gradients."""

import pytest
import torch
from cases import CELLS, DTYPES, TORCH_CELLS, Case, generated
from hypothesis import HealthCheck, given, settings
from specification import NO_CUDNN, assert_right

from seqkernels.backends import triton
from seqkernels.hardware import NO_TRITON, THIS_MACHINE


@given(case=generated())
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_generated_configuration_is_as_close_as_torch(case):
    assert_right(case, None)


@given(case=generated())
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_generated_configuration_on_torch_eager_is_as_close_as_torch(case):
    assert_right(case, "torch_eager")


@pytest.mark.skipif(bool(NO_CUDNN), reason=str(NO_CUDNN))
@given(case=generated(of=TORCH_CELLS))
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
def test_generated_configuration_on_cudnn_is_as_close_as_torch(case):
    assert_right(case, "cudnn")


@pytest.mark.slow
@pytest.mark.skipif(not THIS_MACHINE.triton, reason=NO_TRITON)
@given(case=generated(triton.DTYPES))
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_generated_configuration_on_triton_is_as_close_as_torch(case):
    assert_right(case, "triton")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["padded", "lengths"])
def test_real_size_is_as_close_as_torch(cell, dtype, layout):
    """Long sums and several row blocks, at sizes off the vector width."""
    lengths = (21,) * 19 if layout == "padded" else (21, 0, 9, 20, 1, 13, 13, 2, 17, 21, 5)
    assert_right(Case(cell, dtype, layout, lengths, 30, 100, bidirectional=True), None, draws=2)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden_size", [1, 17, 129, 160, 257])
def test_odd_hidden_size_is_as_close_as_torch(cell, hidden_size):
    assert_right(
        Case(cell, torch.float32, "packed_unsorted", (3, 7, 5, 7), 3, hidden_size),
        None,
        draws=8 if hidden_size < 8 else 1,
    )
