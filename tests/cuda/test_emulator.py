"""The emulator itself: blocks that exchange numbers, right in every order of threads and arrivals, and every fault
found, whatever the order."""

import re

import pytest
import torch
from cuda_paths import faulty

from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

NUMBERS = 64  # of a block: tests/emulator/exchange.h
STEPS = 6


def exchanged(blocks: int, cluster: int) -> torch.Tensor:
    x = torch.arange(blocks * NUMBERS, dtype=torch.float32).view(-1, cluster, NUMBERS)
    for _ in range(STEPS):
        total = torch.zeros_like(x[:, 0])
        for rank in range(cluster):  # in the kernels' order
            total = total + x[:, rank]
        x = (total / cluster)[:, None] + torch.arange(cluster)[:, None]
    return x.flatten()


@pytest.mark.parametrize(("blocks", "cluster"), [(2, 2), (12, 4), (32, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_pushes_within_clusters(blocks, cluster, seed, emulator):
    emulator.seed(seed)
    error, numbers = emulator.exchange_by_pushes(blocks, cluster, STEPS)
    assert not error
    assert torch.equal(torch.tensor(numbers), exchanged(blocks, cluster))


@pytest.mark.parametrize("blocks", [1, 13])
@pytest.mark.parametrize("seed", range(3))
def test_tags_between_all_blocks(blocks, seed, emulator):
    emulator.seed(seed)
    error, numbers = emulator.exchange_by_tags(blocks, STEPS)
    assert not error
    assert torch.equal(torch.tensor(numbers), exchanged(blocks, blocks))


SEEDS = pytest.mark.parametrize("seed", range(20))


@pytest.mark.parametrize(
    ("fault", "event", "error"),
    [
        ("wait", 0, "unwritten"),
        ("wait", 3, "race"),
        ("parity", 0, "unwritten"),
        ("parity", 3, "race|deadlock"),
        ("more_bytes", 2, "deadlock .* awaits 16 bytes"),
        ("fewer_bytes", 2, "race|overrun"),
        ("push", 2, "deadlock .* waiting for pushes"),
        ("cluster_barrier", 0, "no mbarrier"),
        ("barrier", 1, "race"),
    ],
)
@SEEDS
def test_faulty_pushes_are_caught(fault, event, error, seed, emulator):
    emulator.seed(seed)
    found, _ = faulty(emulator, emulator.exchange_by_pushes, fault, event)(8, 4, STEPS)
    assert re.match(error, found)


@pytest.mark.parametrize(
    ("fault", "event", "error"),
    [
        ("wait", 0, "race"),
        ("wait", 7, "race"),
        ("tag", 2, "deadlock .* waiting for a tag"),
        ("tear", 0, "torn"),
        ("tear", 3, "torn"),
        ("stale", 0, "stale"),
        ("barrier", 1, "race|overrun"),
        ("barrier", 3, "race|overrun"),
    ],
)
@SEEDS
def test_faulty_tags_are_caught(fault, event, error, seed, emulator):
    emulator.seed(seed)
    found, _ = faulty(emulator, emulator.exchange_by_tags, fault, event)(5, STEPS)
    assert re.match(error, found)


@SEEDS
def test_a_buffer_that_is_stored_to_before_it_was_read_is_caught(seed, emulator):
    emulator.seed(seed)
    assert re.match("race|overrun", emulator.exchange_by_tags(4, STEPS, buffers=1)[0])


def test_tags_of_a_launch_before_are_caught(emulator):
    """As a CUDA graph leaves them for the next time that it runs."""
    assert not emulator.exchange_by_tags(4, STEPS, launches=2)[0]
    assert emulator.exchange_by_tags(4, STEPS, launches=2, clears=False)[0].startswith("stale")


@SEEDS
def test_a_buffer_that_is_pushed_to_while_it_is_read_is_caught(seed, emulator):
    emulator.seed(seed)
    assert emulator.exchange_by_pushes(4, 4, STEPS, buffers=1)[0].startswith("race")


@SEEDS
def test_a_block_that_ends_before_the_last_push_to_it_is_caught(seed, emulator):
    emulator.seed(seed)
    assert emulator.exchange_by_pushes(4, 4, STEPS, waits=False)[0].startswith("exit")


def test_a_push_without_peers_is_caught(emulator):
    """For st.async, PTX asks that %cluster_nctarank is more than 1."""
    assert emulator.exchange_by_pushes(2, 1, STEPS)[0].startswith("no cluster")


def test_launches_that_a_gpu_refuses_are_refused(emulator):
    assert "no such cluster" in emulator.exchange_by_pushes(6, 4, 1)[0]
    assert "no such cluster" in emulator.exchange_by_pushes(32, 32, 1)[0]
    assert "at the same time" in emulator.exchange_by_tags(133, 1)[0]
