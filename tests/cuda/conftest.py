"""Fixtures that change what the emulator (tests/emulator/run.h) emulates."""

import pytest


@pytest.fixture
def multiprocessors(emulator):
    yield emulator.multiprocessors
    emulator.multiprocessors(132)


@pytest.fixture
def shared_memory(emulator):
    """Sets how many bytes a block may have."""
    yield emulator.shared_memory
    emulator.shared_memory(232448)
