"""States of zeros, as calls without a state begin with: the CPU's kernels skip the products with them."""

import math

import pytest
import torch
from operators import CELLS, Call, forward

STEPS, SEQUENCES = 3, 40


def results(call: Call, last: float, value: float | None = None) -> list[torch.Tensor]:
    """y and the final states of all sequences but the last, which begins with the state `last`."""
    name, x, weights, h_0, c_0, batch_sizes, *_ = call.arguments()
    h_0, c_0 = torch.zeros_like(h_0), None if c_0 is None else torch.zeros_like(c_0)
    h_0[:, -1] = last
    if value is not None:
        weights[1].view(-1)[3] = value
    y, h_n, c_n, _ = forward("cpu")(name, x, weights, h_0, c_0, batch_sizes, False)
    return [y.unflatten(0, (STEPS, SEQUENCES))[:, :-1], h_n[:, :-1], c_n[:, :-1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_they_give_the_bits_of_any_other_states(cell, directions, dtype, instruction_set):
    call = Call(cell, directions, SEQUENCES, STEPS, 13, 21, dtype=dtype)
    for negative, alone, others in zip(*(results(call, last) for last in (-0.0, 0.0, 1.0)), strict=True):
        torch.testing.assert_close(alone, others, rtol=0, atol=0)
        torch.testing.assert_close(negative, others, rtol=0, atol=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_they_do_in_teams_and_with_a_projection(threads, instruction_set):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in (Call("lstm", 2, SEQUENCES, STEPS, 33, 21, projected=9), Call("gru", 1, SEQUENCES, STEPS, 100)):
            for alone, others in zip(results(call, 0.0), results(call, 1.0), strict=True):
                torch.testing.assert_close(alone, others, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_finite_goes_where_it_would_from_any_other_states(cell, value, instruction_set):
    call = Call(cell, 1, SEQUENCES, STEPS, 13, 21)
    alone = results(call, 0.0, value)
    assert alone[0][0].isnan().any()
    for result, others in zip(alone, results(call, 1.0, value), strict=True):
        torch.testing.assert_close(result, others, rtol=0, atol=0, equal_nan=True)
