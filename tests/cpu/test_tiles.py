"""Products by AMX, on every machine: its instructions are emulated (tile_emulation.h)."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("c++") or "")


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the sources are not beside the tests")
@pytest.mark.parametrize("check", ["tiles_check", "quantized_check"])
def test_layers_by_tiles_are_those_by_vectors(tmp_path, check):
    sources = [ROOT / f"tests/cpu/{check}.cpp", ROOT / "csrc/cpu/schedule.cpp"]
    flags = ["-std=c++17", "-Wno-psabi", "-pthread", "-DSEQKERNELS_ISA=emulated", "-DSEQKERNELS_EMULATED_TILES"]
    subprocess.run([*COMPILER, *flags, *sources, "-o", tmp_path / "check"], check=True)
    run = subprocess.run([tmp_path / "check", "120"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
