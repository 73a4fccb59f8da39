"""The emulator (tests/emulator/run.h) and the fixtures that change what it emulates."""

import importlib.util
import os

import pytest

from seqkernels.hardware import THIS_MACHINE


@pytest.fixture(scope="session")
def emulator():
    """Control of the runs: tests/emulator/run.h."""
    if not THIS_MACHINE.emulator:
        pytest.skip("these kernels run on a GPU, and not on the CPU")
    spec = importlib.util.spec_from_file_location("emulator", os.environ["SEQKERNELS_EMULATOR"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sizes_on_gpu(emulator):
    emulator.sizes_on_gpu(True)
    yield
    emulator.sizes_on_gpu(False)


@pytest.fixture
def multiprocessors(emulator):
    yield emulator.multiprocessors
    emulator.multiprocessors(132)


@pytest.fixture
def shared_memory(emulator):
    """Sets how many bytes a block may have."""
    yield emulator.shared_memory
    emulator.shared_memory(232448)
