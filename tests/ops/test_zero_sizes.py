"""Sizes of zero, in every argument: what torch_eager gives, and nothing uninitialised."""

import itertools

import pytest
import torch
from operators import (
    BACKENDS,
    CELLS,
    Call,
    assert_as_in_float64,
    backward,
    both_passes,
    for_backends,
    forward,
    nan_in_fresh_memory,
)

import seqkernels as sk

SIZES = ("sequences", "steps", "hidden", "input", "projected")
KINDS = [(cell, None) for cell in CELLS] + [("lstm", 2)]  # and the projected size
CASES = [
    (cell, {"projected": projected} | dict.fromkeys(zeros, 0))
    for cell, projected in KINDS
    for count in (1, 2, 3)
    for zeros in itertools.combinations(SIZES if projected else SIZES[:-1], count)
]


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    with nan_in_fresh_memory():
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("cell", "sizes"), CASES, ids=str)
def test_sizes_of_zero_give_what_torch_eager_gives(cell, sizes, directions, backend):
    call = for_backends(Call(cell, directions, **sizes), backend)
    assert_as_in_float64(both_passes(call, forward(backend), backward(backend)), call)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_of_no_steps_and_spare_rows_give_what_torch_eager_gives(cell, backend):
    for batch_sizes in ((), (0,), (2, 0, 0)):
        for spare_rows in (0, 2):
            for sizes in ({}, {"input": 0}, {"hidden": 0}):
                call = Call(cell, 2, batch_sizes=batch_sizes, spare_rows=spare_rows, **sizes)
                call = for_backends(call, backend)
                assert_as_in_float64(both_passes(call, forward(backend), backward(backend)), call)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "LSTM"])
@pytest.mark.parametrize(("I", "H", "B", "T"), [s for s in itertools.product((0, 4), (0, 5), (0, 3), (0, 2)) if 0 in s])
def test_modules_of_sizes_of_zero_give_what_torch_gives(name, I, H, B, T):  # noqa: E741
    cell = name.endswith("Cell")
    if not cell and 0 in (I, H, T):
        for library in (torch.nn, sk):  # torch.nn refuses sizes of nothing, and sequences of no steps
            with pytest.raises((ValueError, RuntimeError)):
                getattr(library, name)(I, H)(torch.randn(T, B, I))
        return
    expected, ours = getattr(torch.nn, name)(I, H), getattr(sk, name)(I, H)
    ours.load_state_dict(expected.state_dict())
    inputs = [torch.randn(B, I) if cell else torch.randn(T, B, I)] * 2
    results = []
    for module, input in zip((expected, ours), inputs, strict=True):
        input = input.clone().requires_grad_()
        output = module(input)
        y = output[0] if isinstance(output, tuple) else output
        results.append([y, *torch.autograd.grad(y.sum(), [input, *module.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
