"""The kernel that hf_kernel.py writes, loaded in processes of its own: as Hugging Face's `kernels` imports one, and by
`kernels` itself where it is installed."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from seqkernels.hardware import THIS_MACHINE

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
pytestmark = pytest.mark.skipif(
    bool(THIS_MACHINE.native_missing) or not OBJECTS.exists() or not (ROOT / "hf_kernel.py").exists(),
    reason="the kernel is made of a build's objects, and here is no build",
)

BY_PATH = """
import importlib.util
import json
import sys
from pathlib import Path

variant = next((Path(sys.argv[1]) / "build").iterdir())
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
BY_KERNELS = """
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
from kernels import get_local_kernel
from kernels._rust import Build

print(Build.open(sys.argv[1]).general.backends)
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
"""
COMPARE = """
import torch

assert "seqkernels" not in sys.modules
import seqkernels

torch.manual_seed(0)
own = torch.nn.GRU(5, 7, num_layers=2, bidirectional=True)
x = torch.randn(6, 3, 5)
lengths = torch.tensor([6, 2, 4])
wanted, _ = own(x)
wanted_grads = torch.autograd.grad(wanted.square().sum(), list(own.parameters()))
for library in (kernel, seqkernels, kernel):
    ours = library.GRU(5, 7, num_layers=2, bidirectional=True)
    ours.load_state_dict(own.state_dict())
    y, _ = ours(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), list(ours.parameters())), wanted_grads)
    torch.testing.assert_close(ours(x, lengths=lengths)[0][:2, 1], ours(x[:2, 1:2])[0][:, 0])
    assert type(ours).__module__.partition(".")[0] == library.__name__
found = []
for library in (kernel, seqkernels):
    with torch.profiler.profile() as profile, torch.no_grad():
        library.GRU(5, 7)(x)
    found += [event.key for event in profile.key_averages() if event.key.endswith("::recurrence_forward")]
print(*found, kernel.hardware.native().__file__)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf-kernel")
    subprocess.run([sys.executable, ROOT / "hf_kernel.py", directory], check=True)
    return directory


@pytest.mark.parametrize("load", [BY_PATH, BY_KERNELS], ids=["by path", "get_local_kernel"])
def test_kernel_beside_the_library(kernel, load):
    """Both compute what torch.nn does, each by operators of its own."""
    if load == BY_KERNELS and importlib.util.find_spec("kernels") is None:
        pytest.skip("kernels, of the extra test, is not installed")
    done = subprocess.run([sys.executable, "-c", load + COMPARE, kernel], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    own, ours, library = done.stdout.splitlines()[-1].split()
    file = next(kernel.glob("build/*/*.so"))
    assert own == f"{file.name.partition('.')[0]}::recurrence_forward" and ours == "seqkernels::recurrence_forward"
    assert library == str(file)
