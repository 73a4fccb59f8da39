"""The kernels for clusters of blocks, run on the CPU: every slice, cell and dtype, and every fault found."""

import pytest
import torch
from cuda_paths import STEPWISE, assert_caught, by_path, fitting, path
from gpus import GPUS
from operators import CELLS, Call, assert_rounding_alone_of, both_passes

from seqkernels.backends.cuda.launch import PassLaunch
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
H200 = GPUS["NVIDIA H200"]


def cluster(units: int, tile: int = 8) -> PassLaunch:
    return path("cluster", tile, units)


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


def assert_a_block_needs_all_its_memory(name: str, call: Call, tf32: bool, backward: bool, shared_memory) -> None:
    """The kernels work in just the bytes that the plan says, and with fewer it is refused."""
    forward, back = by_path(STEPWISE)
    for one in fitting(name, H200, call.cell, call.hidden, call.dtype, backward, tf32=tf32):
        planned = by_path(path(name, 1, one["units"]), tf32)[backward]
        passes = (forward, planned) if backward else (planned, back)
        shared_memory(one["shared_memory"])
        both_passes(call, *passes)
        shared_memory(one["shared_memory"] - 1)
        with pytest.raises(RuntimeError, match="do not fit"):
            both_passes(call, *passes)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@DTYPES
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
@pytest.mark.parametrize(("name", "sizes"), [("cluster", (129, 200, 256, 320)), ("persistent grid", (70, 401))])
def test_a_block_needs_all_its_memory(name, sizes, cell, dtype, tf32, backward, shared_memory):
    for hidden in sizes:
        call = Call(cell, 1, 1, 1, hidden, dtype=dtype)
        assert_a_block_needs_all_its_memory(name, call, tf32, backward, shared_memory)


@pytest.mark.parametrize("backward", [False, True])
def test_a_block_that_registers_are_not_enough_for(backward, shared_memory):
    """In 16 bits that takes more than 1024 units on the persistent grid."""
    call = Call("lstm", 1, 1, 1, 1025, dtype=torch.bfloat16)
    grids = fitting("persistent grid", H200, "lstm", 1025, call.dtype, backward)
    assert all(one["shared_weights"] for one in grids)
    assert_a_block_needs_all_its_memory("persistent grid", call, False, backward, shared_memory)


def test_the_gpu_says_how_many_clusters_run_at_the_same_time(multiprocessors):
    for count in (8, 132):
        multiprocessors(count)
        assert torch.ops.seqkernels.cuda_clusters() == [count // blocks for blocks in range(1, 17)]


def test_what_has_no_cluster_kernel_says_why():
    for call, launch, reason in (
        (Call("gru", hidden=129, dtype=torch.float32), cluster(40), "no kernel for a cluster with 40 units"),
        (Call("gru", hidden=514, dtype=torch.float32), cluster(32), "2 to 16 blocks"),
        (Call("gru", hidden=32, dtype=torch.float32), cluster(32), "2 to 16 blocks"),
        (Call("gru", dtype=torch.float64), cluster(32), "takes float64"),
        (Call("gru", dtype=torch.float32), cluster(32, tile=9), "takes 1 to 8 sequences"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            both_passes(call, *by_path(launch))
