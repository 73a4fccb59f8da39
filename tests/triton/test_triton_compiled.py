"""Every kernel and tile of the Triton backend, compiled for GPUs that are not here: nothing spills, all fits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpus import GPUS

from seqkernels.backends.triton.tiles import SCRATCH
from seqkernels.hardware import NO_TRITON, THIS_MACHINE

SCRIPT = Path(__file__).with_name("triton_compile.py")
TARGETS = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X")
# Each takes minutes of two cores: SEQKERNELS_TEST_TARGETS="H200,MI300X" leaves the others out.
WANTED = os.environ.get("SEQKERNELS_TEST_TARGETS", "").split(",")
KERNELS = {
    "resident_forward",
    "resident_backward",
    "step_forward",
    "step_backward",
    "step_project",
    "step_project_backward",
    "norm_step_forward",
    "norm_step_backward",
}
RESIDENT_NORMS = {"norm_resident_forward", "norm_resident_backward"}  # on Hopper alone


@pytest.mark.slow
@pytest.mark.skipif(not THIS_MACHINE.triton, reason=NO_TRITON)
@pytest.mark.parametrize("name", TARGETS)
def test_every_tile_compiles_without_spilling_and_fits(name, monkeypatch):
    if not any(target in name for target in WANTED):
        pytest.skip("SEQKERNELS_TEST_TARGETS leaves it out")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = GPUS[name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with tests/support
    done = subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in compiled} == KERNELS | (RESIDENT_NORMS if gpu.target == "sm_90" else set())
    for kernel in compiled:
        sizes = kernel["values"]
        assert kernel["spilled"] == 0, kernel
        assert kernel["registers"] <= (512 if gpu.amd else 255), kernel
        assert kernel["shared"] <= gpu.shared_memory, kernel
        if "resident" not in kernel["name"]:
            assert kernel["tensor_cores"] == 0, kernel
            continue
        # What tiles.launch_of reckons with.
        units, size = int(sizes["UNITS"]), 4 if kernel["types"]["w_hh"] == "*fp32" else 2
        weights = (1 if gpu.amd else int(sizes["GATES"])) * units * units * size
        assert kernel["shared"] <= weights + SCRATCH * units, kernel
        exact = size == 4 and sizes["PRECISION"] == "ieee" and not gpu.amd
        assert (kernel["tensor_cores"] == 0) == exact, kernel
