"""The specification itself, against torch.nn in float64, so that it cannot be wrong alone."""

from dataclasses import replace

import pytest
import torch
from cases import CELLS, Case, run_spec, run_torch


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("bias", [True, False])
def test_specification_equals_torch_nn_in_float64(cell, layout, bias):
    lengths = (4, 4, 4) if layout == "padded" else (2, 5, 3)
    case = Case(cell, torch.float64, layout, lengths, num_layers=2, bidirectional=True, bias=bias)
    for judged in (case, replace(case, proj_size=3)) if cell == "lstm" else (case,):
        torch.testing.assert_close(run_spec(judged), run_torch(judged), rtol=1e-12, atol=1e-13)
