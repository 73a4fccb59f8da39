"""Layers of few steps and few rows, as cells are, which multiply by their weights where these lie."""

import pytest
import torch
from operators import (
    BELOW_FLOAT64,
    CELLS,
    Call,
    assert_as_in_float64,
    assert_rounding_alone,
    backward,
    both_passes,
    forward,
    nan_in_fresh_memory,
)

ROWS = 1, 3, 8, 9, 17, 64, 65
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_gives_what_torch_eager_gives(cell, rows, instruction_set):
    calls = [
        Call(cell, steps=1, sequences=rows, input=21, hidden=37),
        Call(cell, steps=1, sequences=rows, input=401, hidden=96, bias=False),  # deeper than a slice of a panel
    ]
    if cell == "lstm":
        calls += [Call(cell, steps=1, sequences=rows, input=32, hidden=200, projected=p) for p in (19, 64)]
    for call in calls:
        with nan_in_fresh_memory():
            assert_as_in_float64(both_passes(call, forward("cpu"), backward("cpu")), call)


@BELOW_FLOAT64
@pytest.mark.parametrize("rows", [1, 4, 9, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_errs_by_rounding_alone_in_dtypes_below_float64(cell, rows, dtype, instruction_set):
    assert_rounding_alone(Call(cell, steps=1, sequences=rows, input=24, hidden=37, dtype=dtype), "cpu")
    assert_rounding_alone(Call(cell, steps=1, sequences=rows, input=51, hidden=64, dtype=dtype), "cpu")


@pytest.mark.parametrize("batch_sizes", [(12, 12), (20, 9), (9, 4, 1, 1)])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_a_few_steps_give_what_torch_eager_gives(cell, directions, batch_sizes, instruction_set):
    sequences, steps = batch_sizes[0] + 1, len(batch_sizes)
    call = Call(cell, directions, sequences, steps, 37, 21, batch_sizes=batch_sizes)
    with nan_in_fresh_memory():
        assert_as_in_float64(both_passes(call, forward("cpu"), backward("cpu")), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_where_they_lie_give_the_bits_of_packed_ones(cell, dtype, instruction_set):
    """Packed are those of 90 rows."""
    if instruction_set == "amx" and dtype == torch.bfloat16:
        pytest.skip("AMX multiplies by packed weights alone, and adds up in one chain where vectors have several")
    name, x, weights, h_0, c_0, *_ = Call(cell, 1, 90, 1, 70, 405, dtype=dtype).arguments()
    all_rows = forward("cpu")(name, x, weights, h_0, c_0, None, False)
    first = [None if state is None else state[:, :20].contiguous() for state in (h_0, c_0)]
    few = forward("cpu")(name, x[:20].contiguous(), weights, *first, None, False)
    assert torch.equal(few[0], all_rows[0][:20])
    for found, right in zip(few[1:3], all_rows[1:3], strict=True):
        assert torch.equal(found, right[:, :20])
