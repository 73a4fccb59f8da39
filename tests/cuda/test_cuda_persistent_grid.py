"""The kernels of the persistent grid in the emulator: CTAs that exchange through global memory, in clusters of 2 and 4;
every cell and dtype, and every planted fault caught."""

import random

import pytest
import torch
from cuda_paths import assert_caught, by_path, path
from operators import CELLS, Call, assert_rounding_alone_of, both_passes

from seqkernels.backends.cuda.launch import PassLaunch
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
CLUSTERS = pytest.mark.parametrize("blocks", [2, 4])


def persistent_grid(blocks: int, tile: int = 8) -> PassLaunch:
    """In clusters of so many blocks, of 16 hidden units each."""
    return path("persistent grid", tile, 16 * blocks)


@pytest.mark.parametrize("hidden", [5, 64, 129, 200])
@CLUSTERS
@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_in_clusters_of_either_size(cell, dtype, blocks, hidden):
    call = Call(cell, 1, 9, 3, hidden, batch_sizes=(9, 5, 1), bias=False, dtype=dtype)
    assert_rounding_alone_of(call, *by_path(persistent_grid(blocks)))


@pytest.mark.parametrize("at_once", [4, 8, 16, 132])
@pytest.mark.parametrize("tile", [1, 3, 5, 8])
@pytest.mark.parametrize("cell", CELLS)
def test_groups_take_turns_at_tiles_and_directions(cell, tile, at_once, multiprocessors):
    """Of 4 blocks each: from one group for everything to one for each tile of either direction."""
    multiprocessors(at_once)
    call = Call(cell, 2, 17, 5, 50, batch_sizes=(17, 7, 7, 7, 4, 2, 1), dtype=torch.bfloat16)
    assert_rounding_alone_of(call, *by_path(persistent_grid(2, tile)))


@pytest.mark.parametrize(
    ("directions", "sizes"), [(2, (16, 4)), (2, (16, 16, 4)), (2, (13, 4)), (2, (16, 12, 4)), (1, (16, 12, 4))], ids=str
)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_tile_begins_while_warps_are_behind_with_another(cell, directions, sizes, emulator, multiprocessors):
    """A warp whose sequences have ended, or not begun, must have read what the others are about to overwrite."""
    multiprocessors(8)
    call = Call(cell, directions, sizes[0], len(sizes), 90, batch_sizes=sizes, dtype=torch.bfloat16)
    for seed in range(3):
        emulator.seed(seed)
        assert_rounding_alone_of(call, *by_path(persistent_grid(2)))


@pytest.mark.parametrize("seed", range(30))
def test_any_lengths_in_any_tiles(seed, emulator, multiprocessors):
    draw = random.Random(seed)
    emulator.seed(seed)
    multiprocessors(draw.choice([8, 16, 24, 132]))
    sizes = sorted((draw.randint(1, 24) for _ in range(draw.randint(1, 6))), reverse=True)
    cell, directions, hidden = draw.choice(CELLS), draw.randint(1, 2), draw.choice([20, 33, 90])
    call = Call(cell, directions, sizes[0], len(sizes), hidden, batch_sizes=tuple(sizes), dtype=torch.bfloat16)
    assert_rounding_alone_of(call, *by_path(persistent_grid(draw.choice([2, 4]), draw.randint(1, 8))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "blocks"),
    [
        ("gru", 1024, torch.float32, 4),
        ("lstm", 767, torch.float32, 2),
        ("gru", 2047, torch.float16, 2),
        ("lstm", 2048, torch.bfloat16, 4),
    ],
    ids=str,
)
def test_the_largest_layers(cell, hidden, dtype, blocks):
    call = Call(cell, 1, 2, 2, hidden, batch_sizes=(2, 1), dtype=dtype)
    assert_rounding_alone_of(call, *by_path(persistent_grid(blocks)))


FAULTS = [
    # pass, fault, which of a thread's, what is said
    ("forward", "cluster_barrier", 0, "no mbarrier|unwritten|race"),
    ("forward", "barrier", 0, "unwritten|race"),
    ("forward", "barrier", 1, "race|overrun"),
    ("forward", "barrier", 2, "race"),
    ("forward", "wait", 0, "race"),
    ("forward", "wait", 1, "race"),
    ("forward", "tag", 0, "deadlock .* waiting for a tag"),
    ("forward", "tag", 1, "deadlock .* waiting for a tag"),
    ("forward", "tear", 0, "torn"),
    ("forward", "tear", 1, "torn"),
    ("forward", "stale", 0, "stale"),
    ("backward", "cluster_barrier", 0, "no mbarrier|unwritten|race"),
    ("backward", "barrier", 0, "unwritten|race"),
    ("backward", "barrier", 1, "unwritten|race"),
    ("backward", "wait", 0, "unwritten|race"),
    ("backward", "wait", 1, "unwritten|race"),
    ("backward", "wait", 2, "race"),
    ("backward", "parity", 1, "unwritten|race|deadlock"),
    ("backward", "more_bytes", 1, "deadlock .* awaits 16 bytes"),
    ("backward", "fewer_bytes", 1, "race|overrun"),
    ("backward", "push", 0, "deadlock .* waiting for pushes"),
    ("backward", "tag", 2, "deadlock .* waiting for a tag"),
    ("backward", "tear", 2, "torn"),
    ("backward", "stale", 0, "stale"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: " ".join(map(str, fault[:3])))
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_fault_is_caught(cell, fault, emulator):
    assert_caught(emulator, cell, persistent_grid(2), fault)


def test_what_has_no_kernel_says_why(multiprocessors, shared_memory):
    multiprocessors(60)
    shared_memory(99 << 10)
    for call, launch, reason in (
        (Call("rnn_tanh", hidden=1000, dtype=torch.float32), persistent_grid(4), "64 blocks in clusters of 4"),
        (Call("gru", dtype=torch.float64), persistent_grid(4), "float64"),
        (Call("gru", dtype=torch.float32), persistent_grid(3), "no kernel for a persistent grid with 48 units"),
        (Call("gru", dtype=torch.float32), persistent_grid(4, tile=9), "takes 1 to 8 sequences"),
        (Call("lstm", hidden=900, dtype=torch.float32), persistent_grid(4), "do not fit"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            both_passes(call, *by_path(launch))
