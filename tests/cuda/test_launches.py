"""What a call of the CUDA operators asks for: launches, torch's operations (mostly a launch each), and memory. On short
sequences these are what a call costs."""

from dataclasses import replace

import pytest
import torch
from cuda_paths import SINGLE_CTA, THIS_GPU, by_path, path
from operators import Call, both_passes

from seqkernels.backends.cells import CELLS
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

PATHS = {"single CTA": SINGLE_CTA}
if THIS_GPU.target == "sm_90":
    PATHS |= {"cluster": path("cluster", units=32), "persistent grid": path("persistent grid", units=32)}
# Forward: biases, product, sweep; backward: sweep, sums of biases, what finishes them and gathers states, and a product
# for x and for each weight. Where gates stay apart, and so have two gradients, there are two for x and two for w_ih.
FORWARD, BACKWARD = 3, {name: 8 if cell.gates_apart else 6 for name, cell in CELLS.items()}
# Besides: a single CTA packs its weights in the launch that adds biases, backward in one of its own; the persistent
# grid has its flags cleared.
MORE = {"single CTA": (0, 1), "cluster": (0, 0), "persistent grid": (1, 1)}


def asked_for(emulator, call: Call, launch) -> list[tuple[int, int]]:
    """Of each pass: launches and operations together, and allocations besides the results."""
    found = []

    def counted(run):
        def counting(*args):
            before = emulator.counts()
            results = run(*args)
            now = {name: count - before[name] for name, count in emulator.counts().items()}
            tensors = sum(len(one) if isinstance(one, list) else 1 for one in results)
            found.append((now["launches"] + now["operations"], now["allocations"] - tensors))
            return results

        return counting

    both_passes(call, *map(counted, by_path(launch)))
    return found


@pytest.mark.parametrize("cell", BACKWARD)
@pytest.mark.parametrize("name", PATHS)
def test_a_pass_takes_few_launches_and_one_allocation(name, cell, emulator):
    call = Call(cell, 1, 3, 2, 70, dtype=torch.bfloat16)
    forward, backward = (FORWARD + MORE[name][0], 1), (BACKWARD[cell] + MORE[name][1], 1)
    assert asked_for(emulator, call, PATHS[name]) == [forward, backward]
    # A packed batch takes one more, which writes where its steps begin.
    packed = replace(call, batch_sizes=(3, 2))
    assert asked_for(emulator, packed, PATHS[name]) == [(forward[0] + 1, 1), (backward[0] + 1, 1)]
    # In both directions there are as many products more.
    both = replace(call, directions=2)
    products = 5 if CELLS[cell].gates_apart else 3
    assert asked_for(emulator, both, PATHS[name]) == [(forward[0] + 1, 1), (backward[0] + products, 1)]


def test_without_biases_there_is_nothing_to_add_up(emulator):
    call = Call("lstm", 1, 3, 2, 70, dtype=torch.bfloat16, bias=False)
    if "cluster" in PATHS:
        assert asked_for(emulator, call, PATHS["cluster"]) == [(FORWARD - 1, 1), (BACKWARD["lstm"] - 1, 1)]
    assert asked_for(emulator, call, SINGLE_CTA) == [(FORWARD, 1), (BACKWARD["lstm"], 1)]
