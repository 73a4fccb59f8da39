"""The kernels for clusters of blocks, run on the CPU: every slice, cell and dtype, and every fault found."""

import pytest
import torch
from cuda_paths import SHARED, assert_caught, by_path
from gpus import GPUS
from operators import CELLS, Call, assert_rounding_alone_of, both_passes

from seqkernels.backends import cuda
from seqkernels.backends.cuda import Path
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
H200 = GPUS["NVIDIA H200"]


def cluster(units: int, tile: int = 8, memory: int = SHARED) -> Path:
    return Path("cluster", tile, memory, units)


@pytest.mark.parametrize(
    ("units", "hidden"),
    [(32, 33), (32, 64), (32, 129), (32, 200), (48, 130), (48, 191), (48, 240), (64, 131), (64, 192), (64, 256)],
)
@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_every_slice(cell, dtype, units, hidden):
    call = Call(cell, 1, 9, 3, hidden, batch_sizes=(9, 5, 1), bias=False, dtype=dtype)
    assert_rounding_alone_of(call, *by_path(cluster(units)))


@pytest.mark.parametrize("tile", [1, 3, 5])
@DTYPES
@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_in_tiles_of_every_size(cell, dtype, tile):
    """Sequences that end early, and so begin late in the other direction, in tiles of which the last is not full."""
    call = Call(cell, 2, 7, 5, 129, batch_sizes=(7, 7, 4, 2, 1), dtype=dtype)
    assert_rounding_alone_of(call, *by_path(cluster(32, tile)))


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "units"),
    [
        ("gru", 512, torch.float32, 32),
        ("lstm", 511, torch.float32, 32),
        ("gru", 768, torch.bfloat16, 48),
        ("gru", 767, torch.float16, 48),
        ("lstm", 768, torch.float16, 48),
        ("rnn_tanh", 1024, torch.bfloat16, 64),
    ],
    ids=str,
)
def test_the_largest_clusters(cell, hidden, dtype, units):
    call = Call(cell, 1, 3, 2, hidden, batch_sizes=(3, 2), dtype=dtype)
    assert_rounding_alone_of(call, *by_path(cluster(units)))


FAULTS = [
    # pass, fault, which of a thread's, what is said
    ("forward", "cluster_barrier", 0, "no mbarrier|unwritten|race"),
    ("forward", "barrier", 0, "unwritten|race"),
    ("forward", "barrier", 2, "race"),
    ("forward", "warp_barrier", 1, "race"),
    ("forward", "wait", 0, "race"),
    ("forward", "wait", 2, "race|exit"),
    ("forward", "parity", 1, "race|deadlock"),
    ("forward", "more_bytes", 1, "deadlock .* awaits 16 bytes"),
    ("forward", "fewer_bytes", 1, "race|overrun"),
    ("forward", "push", 2, "deadlock .* waiting for pushes"),
    ("backward", "cluster_barrier", 0, "no mbarrier|unwritten|race"),
    ("backward", "barrier", 1, "race"),
    ("backward", "wait", 0, "unwritten|race"),
    ("backward", "wait", 2, "race"),
    ("backward", "wait", 3, "race|exit"),
    ("backward", "parity", 1, "unwritten|race|deadlock"),
    ("backward", "more_bytes", 1, "deadlock .* awaits 16 bytes"),
    ("backward", "fewer_bytes", 1, "race|overrun"),
    ("backward", "push", 0, "deadlock .* waiting for pushes"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: " ".join(map(str, fault[:3])))
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_fault_is_caught(cell, fault, emulator):
    assert_caught(emulator, cell, cluster(32), fault)


LARGEST = [
    # cell, dtype, TF32, and the most hidden units of a cluster forward, backward
    ("rnn_tanh", torch.bfloat16, False, (1024, 1024)),
    ("gru", torch.bfloat16, False, (832, 768)),
    ("lstm", torch.float16, False, (768, 768)),
    ("rnn_relu", torch.float32, True, (1024, 1024)),
    ("gru", torch.float32, True, (512, 512)),
    ("lstm", torch.float32, True, (512, 512)),
    ("rnn_tanh", torch.float32, False, (1024, 960)),
    ("gru", torch.float32, False, (512, 512)),
    ("lstm", torch.float32, False, (512, 512)),
]


LARGEST_ON_PERSISTENT_GRID = [
    # As above. 2112 units are a block for each of the 132 multiprocessors.
    ("rnn_tanh", torch.bfloat16, False, (2112, 2112)),
    ("gru", torch.bfloat16, False, (2112, 2112)),
    ("lstm", torch.float16, False, (2048, 2112)),
    ("rnn_relu", torch.float32, True, (2112, 2112)),
    ("gru", torch.float32, True, (1408, 1536)),
    ("lstm", torch.float32, True, (1024, 1024)),
    ("rnn_tanh", torch.float32, False, (2112, 2112)),
    ("gru", torch.float32, False, (1152, 1536)),
    ("lstm", torch.float32, False, (768, 1024)),
]


def assert_fits_up_to(find, row: tuple, first: int) -> None:
    """`find`, of `select`, has groups of blocks for every layer from `first` units on to the most of either pass."""
    cell, dtype, tf32, expected = row
    for backward, most in zip((False, True), expected, strict=True):
        for hidden in range(first, 2200):
            found, against = find(cell, hidden, False, dtype, tf32, H200, backward)
            assert bool(found) == (hidden <= most) != bool(against), hidden


@pytest.mark.parametrize("row", LARGEST, ids=str)
def test_select_knows_which_layers_fit(row):
    assert_fits_up_to(cuda.clusters, row, 129)


@pytest.mark.parametrize("row", LARGEST_ON_PERSISTENT_GRID, ids=str)
def test_select_knows_which_layers_fit_the_persistent_grid(row):
    assert_fits_up_to(cuda.persistent_grid, row, 1)


def assert_a_block_needs_all_its_memory(name: str, call: Call, tf32: bool, backward: bool) -> None:
    """The kernels take just what `select` says, and no byte less."""
    groups = {"cluster": cuda.clusters, "persistent grid": cuda.persistent_grid}[name]
    for found in groups(call.cell, call.hidden, False, call.dtype, tf32, H200, backward)[0]:
        paths = (Path(name, 1, found.memory - i, found.units) for i in (0, 1))
        tight, tighter = (by_path(path, tf32)[backward] for path in paths)
        forward, back = by_path(Path())
        both_passes(call, *((forward, tight) if backward else (tight, back)))
        with pytest.raises(RuntimeError, match="do not fit"):
            both_passes(call, *((forward, tighter) if backward else (tighter, back)))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@DTYPES
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
@pytest.mark.parametrize(("name", "sizes"), [("cluster", (129, 200, 256, 320)), ("persistent grid", (70, 401))])
def test_select_knows_the_memory_of_a_block(name, sizes, cell, dtype, tf32, backward):
    for hidden in sizes:
        call = Call(cell, 1, 1, 1, hidden, dtype=dtype)
        assert_a_block_needs_all_its_memory(name, call, tf32, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_select_knows_the_memory_of_a_block_that_registers_are_not_enough_for(backward):
    """In 16 bits that takes more than 1024 units on the persistent grid."""
    call = Call("lstm", 1, 1, 1, 1025, dtype=torch.bfloat16)
    assert all(
        found.weights for found in cuda.persistent_grid("lstm", 1025, False, call.dtype, False, H200, backward)[0]
    )
    assert_a_block_needs_all_its_memory("persistent grid", call, False, backward)


def test_the_gpu_says_how_many_clusters_run_at_the_same_time(emulator):
    for multiprocessors in (8, 132):  # the last are those that it begins with
        emulator.multiprocessors(multiprocessors)
        assert torch.ops.seqkernels.cuda_clusters() == [multiprocessors // blocks for blocks in range(1, 17)]


def test_a_road_for_every_batch():
    def paths(hidden, sequences, dtype=torch.bfloat16, gpu=H200):
        path, step = cuda.path("lstm", hidden, False, dtype, False, gpu, False, 1, sequences)
        assert 0.1 < step < 1000
        return path

    few, many = paths(512, 1), paths(512, 120)
    assert (few.name, few.tile, few.units) == ("cluster", 1, 32)
    assert (many.name, many.tile, many.units) == ("cluster", 8, 64)  # of the other slices, half would have to wait
    assert paths(512, 10000).name == "stepwise"
    for size in (512, 640, 768):  # an odd number of units is no cliff
        assert paths(size - 1, 8) == paths(size, 8) and paths(size - 1, 128) == paths(size, 128)
    assert paths(64, 1).name == "single CTA"
    assert [paths(size, 1).name for size in (1024, 2048, 2500)] == ["persistent grid", "persistent grid", "stepwise"]
    assert paths(512, 1, gpu=GPUS["NVIDIA A100-SXM4-80GB"]).name == "stepwise"
    assert "cluster with 32 units a block" in str(few)


def test_what_has_no_cluster_kernel_says_why():
    for call, path, reason in (
        (Call("gru", hidden=129, dtype=torch.float32), cluster(40), "so many units a block"),
        (Call("gru", hidden=514, dtype=torch.float32), cluster(32), "at most 16 blocks"),
        (Call("gru", hidden=32, dtype=torch.float32), cluster(32), "at least 2 blocks"),
        (Call("gru", dtype=torch.float64), cluster(32), "no cluster kernel for float64"),
        (Call("gru", dtype=torch.float32), cluster(32, tile=9), "takes 1 to 8 sequences"),
        (Call("gru", dtype=torch.float32), Path("clusters"), "unknown path"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            both_passes(call, *by_path(path))
