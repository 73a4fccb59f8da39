"""What a call of the CUDA operators asks for: launches, torch's operations (mostly a launch each), and memory. On short
sequences these are what a call costs."""

from dataclasses import replace

import pytest
import torch
from cuda_paths import SINGLE_CTA, THIS_GPU, asked_of, by_path, path
from operators import Call, both_passes

from seqkernels.backends.cells import CELLS
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

PATHS = {"single CTA": SINGLE_CTA}
if THIS_GPU.target == "sm_90":
    PATHS |= {"cluster": path("cluster", units=32), "persistent grid": path("persistent grid", units=32)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "TF32": torch.float32}
# Forward: product, sweep; backward: sweep, the gradients of biases with the states that steps started from, and a
# product for x and for each weight. The persistent grid besides has its flags cleared.
FORWARD, BACKWARD, FLAGS = 2, 5, 1


def asked_for(emulator, call: Call, launch, tf32: bool = False) -> list[tuple[int, int]]:
    """Of each pass: launches and operations together, and allocations besides the results."""
    found = asked_of(emulator, call, by_path(launch, tf32))
    return [(one["launches"] + one["operations"], one["allocations"] - one["results"]) for one in found]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PATHS)
def test_a_pass_takes_few_launches_and_one_allocation(name, dtype, cell, emulator):
    call = Call(cell, 1, 3, 2, 70, dtype=DTYPES[dtype])
    flags = FLAGS if name == "persistent grid" else 0
    forward, backward = FORWARD + flags, BACKWARD + flags

    def count(call: Call) -> list[tuple[int, int]]:
        return asked_for(emulator, call, PATHS[name], dtype == "TF32")

    assert count(call) == [(forward, 1), (backward, 1)]
    # A packed batch takes one more, which writes where its steps begin.
    assert count(replace(call, batch_sizes=(3, 2))) == [(forward + 1, 1), (backward + 1, 1)]
    # Both directions share products, but for x, whose gradient is the sum of theirs.
    assert count(replace(call, directions=2)) == [(forward, 1), (backward + 1, 1)]
    if cell != "rnn_relu" or dtype != "bfloat16":
        return
    both = replace(call, directions=2, batch_sizes=(3, 2), bias=False)
    assert count(both) == [(forward + 1, 1), (backward + 2, 1)]


def test_directions_share_no_product_over_many_rows(emulator):
    """Of weights' gradients, whose sums over many rows cuBLAS divides only outside of batches."""
    few, many = (Call("rnn_relu", 2, 1030, steps, 2, dtype=torch.float32) for steps in (1, 4))
    assert asked_for(emulator, few, SINGLE_CTA) == [(FORWARD, 1), (BACKWARD + 1, 1)]
    assert asked_for(emulator, many, SINGLE_CTA) == [(FORWARD, 1), (BACKWARD + 3, 1)]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_weights_that_no_step_reads_again_are_not_packed(cell, emulator):
    """A single CTA has them in registers and shared memory, as far as these go."""
    small, large = (Call(cell, 1, 3, 2, hidden, dtype=torch.bfloat16) for hidden in (128, 256))
    assert asked_for(emulator, small, SINGLE_CTA) == [(FORWARD, 1), (BACKWARD, 1)]
    assert asked_for(emulator, large, SINGLE_CTA) == [(FORWARD + 1, 1), (BACKWARD + 1, 1)]


def test_what_is_not_wanted_is_not_launched(emulator):
    """Without gradients of weights and of x it is the sweep alone."""
    forward, backward = by_path(SINGLE_CTA)
    found = []
    for wanted in ((True, False), (False, True), (False, False)):

        def counting(*args, wanted=wanted):
            before = emulator.counts()
            results = backward(*args[:11], *wanted)
            found.append(sum(emulator.counts()[name] - before[name] for name in ("launches", "operations")))
            return results

        both_passes(Call("gru", 1, 3, 2, 70, dtype=torch.bfloat16), forward, counting)
    assert found == [2, 4, 1]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_weights_of_directions_lie_anywhere(cell, emulator):
    """A product of a batch takes both from wherever they are, the second direction's before the first's as well."""
    call = Call(cell, 2, 3, 4, 20, input=6, dtype=torch.float32)
    forward, backward = by_path(SINGLE_CTA)
    expected = both_passes(call, forward, backward)

    def moved(run, at):
        def running(*args):
            weights = args[at]
            each = len(weights) // 2
            order = [*weights[each:], *weights[:each]]
            memory = torch.cat([torch.cat([w.flatten(), w.new_zeros(1000 - w.numel() % 10)]) for w in order])
            pieces = memory.split([w.numel() + 1000 - w.numel() % 10 for w in order])
            placed = [piece[: w.numel()].view_as(w) for piece, w in zip(pieces, order, strict=True)]
            assert placed[0].data_ptr() < placed[each].data_ptr()
            return run(*args[:at], [*placed[each:], *placed[:each]], *args[at + 1 :])

        return running

    for one, other in zip(both_passes(call, moved(forward, 2), moved(backward, 5)), expected, strict=True):
        assert torch.equal(one, other)
