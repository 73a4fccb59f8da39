"""One fixture runs a test on every backend that is here; a backend that is not says why."""

import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

# On which device the tests run: `make gpu-check` says cuda.
torch.set_default_device(os.environ.get("SEQKERNELS_TEST_DEVICE", "cpu"))
torch.backends.cudnn.allow_tf32 = False  # tests of exact float32 are most; that of TF32 says so
if torch.get_default_device().type == "cpu":
    # Before seqkernels looks: the kernels for GPUs then run there as well, Triton's interpreted, those in CUDA as
    # `make test` has built them for it (tests/emulator), and for cuDNN's a stand-in.
    os.environ["TRITON_INTERPRET"] = "1"
    emulator = Path(__file__).parent.parent / "build/emulator/emulator.so"
    if emulator.exists():
        os.environ["SEQKERNELS_EMULATOR"] = str(emulator)
    import cudnn_stand_in  # noqa: F401

from operators import NO_CPU_KERNELS  # noqa: E402

from seqkernels import select  # noqa: E402
from seqkernels.backends.cells import CELLS  # noqa: E402
from seqkernels.hardware import THIS_MACHINE, machine_of  # noqa: E402

# Every run on CI tries the same cases; elsewhere they change from run to run.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("home", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")


# Triton's interpreter takes seconds where a kernel takes microseconds. Those of tests/ops run in it nevertheless.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") else ()


def cell_of(parameters: dict) -> str:
    """The cell that a test's parameters name, by "cell" or, as a module and what is said of it, by "name"."""
    module = parameters.get("name", "GRU").split()[0]
    named = next((cell.name for cell in CELLS.values() if cell.display_name == module), "gru")
    return parameters.get("cell", named)


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in INTERPRETED)) for name in select.BACKENDS]
)
def backend(request) -> str:
    device = torch.empty(0).device
    call = select.Call(cell_of(request.node.callspec.params), device.type, torch.float32)
    against = select.unsupported(request.param, call, machine_of(device))
    if against:
        pytest.skip(f"{request.param}: {against}")
    return request.param


@pytest.fixture(params=["amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline"])
def instruction_set(request):
    if NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    from seqkernels import _C

    before = _C.isa()
    try:
        _C.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.force_isa(before)


@pytest.fixture
def dtype(backend) -> torch.dtype:
    """In which a backend's properties show most clearly."""
    return torch.float32 if backend == "triton" else torch.float64


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


@pytest.fixture(autouse=True)
def _fresh_threads():
    """Tests that change the number of threads do not change it for others."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
