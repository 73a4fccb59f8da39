"""Names in a profile, by an environment variable."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from seqkernels import ranges

CODE = """
import torch, seqkernels as sk
layers = sk.GRU(4, 5, num_layers=2), sk.LSTMCell(4, 5)
with torch.profiler.profile() as profile:
    layers[0](torch.randn(6, 3, 4))[0].sum().backward()
    layers[1](torch.randn(3, 4))
print("\\n".join(sorted(event.key for event in profile.key_averages() if event.key.startswith("seqkernels."))))
"""


@pytest.mark.parametrize("on", ["0", "1"])
def test_passes_have_names_where_they_are_asked_for(on):
    environment = {**os.environ, "SEQKERNELS_NVTX": on, "SEQKERNELS_BACKEND": "torch_eager"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True)
    names = ["gru backward: torch_eager", "gru forward: torch_eager", "lstm forward: torch_eager"]
    assert done.stdout.split("\n")[:-1] == ([f"seqkernels.{name}" for name in names] if on == "1" else [""])


def test_a_gpu_gets_ranges_of_nvtx_that_say_the_path(monkeypatch):
    begun = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: begun.append(name) or contextlib.nullcontext())
    plan, call = SimpleNamespace(backend="cuda", kernel="cluster"), SimpleNamespace(cell="gru")
    assert ranges.of_forward(lambda *args: args)(plan, call, 3) == (plan, call, 3)
    assert ranges.of_backward(lambda *args: args[1:])(SimpleNamespace(cell="lstm"), "cuda", 4) == ("cuda", 4)
    assert begun == ["seqkernels.gru forward: cuda (cluster)", "seqkernels.lstm backward: cuda"]
