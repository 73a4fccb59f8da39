"""One fixture runs a test on every backend that is here; a backend that is not says why."""

import os

import hypothesis
import pytest
import torch

from seqkernels import select
from seqkernels.hardware import HERE

# Every run on CI tries the same cases; at home they change.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("home", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")


@pytest.fixture(params=select.BACKENDS)
def backend(request) -> str:
    problem = select.Problem("gru", "cpu", torch.float32)
    against = select.reason_against(request.param, problem, HERE)
    if against:
        pytest.skip(f"{request.param}: {against}")
    return request.param


@pytest.fixture(autouse=True)
def _fresh_threads():
    """Tests that change the number of threads do not change it for others."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
