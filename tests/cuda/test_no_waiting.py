"""Nothing reads what a device holds: what is on a GPU goes into a CUDA graph, and the host does not wait.

Here the CPU stands for the GPU: lengths count as out of sight, the kernels take batch sizes as those on a GPU, and
every way to read a value raises.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels as sk
from seqkernels import late_checks, pieces

READING = (
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
)
WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class NoReading(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READING, f"{func.__name__} reads a tensor"
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITING, f"{func} waits for a tensor"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cpu_as_gpu(sizes_on_gpu, monkeypatch):
    monkeypatch.setattr(late_checks, "out_of_sight", lambda values: True)


@pytest.mark.parametrize(
    "read", [lambda t: t[0].item(), torch.Tensor.tolist, torch.Tensor.cpu, lambda t: int(t[0]), lambda t: bool(t.any())]
)
def test_reading_is_noticed(read):
    with pytest.raises(AssertionError, match="tensor"), NoWaiting(), NoReading():
        read(torch.ones(3))


@pytest.mark.parametrize("layout", ["padded", "lengths", "state", "nested", "reset", "reset and lengths"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("GRU", {"num_layers": 2, "dropout": 0.5}),
        ("LSTM", {"bidirectional": True}),
        ("LSTM", {"bidirectional": True, "layer_norm": True}),
    ],
)
def test_a_training_step_reads_nothing(cls, options, layout, cpu_as_gpu, monkeypatch):
    layer, x, arguments = getattr(sk, cls)(4, 5, **options), torch.randn(6, 3, 4), {}
    layer.backend = "cuda"
    if layout.startswith("reset"):  # as while a CUDA graph is captured
        monkeypatch.setattr(pieces, "may_read", lambda marks: False)
        arguments["reset"] = torch.rand(6, 3) < 0.3
    if layout.endswith("lengths"):
        arguments["lengths"] = torch.tensor([6, 2, 0])
    if layout == "state":
        arguments["hx"] = torch.randn(2, 3, 5) if cls == "GRU" else (torch.randn(2, 3, 5), torch.randn(2, 3, 5))
    if layout == "nested":
        x = torch.nested.nested_tensor([torch.randn(6, 4), torch.randn(2, 4)], layout=torch.jagged)
    layer(x, **arguments)  # the first call may look around: plans, notes of checks
    with NoWaiting(), NoReading():
        output, _ = layer(x, **arguments)
        (output.values() if layout == "nested" else output).square().sum().backward()
    assert layer.weight_hh_l0.grad.isfinite().all()


def test_a_step_of_a_stream_reads_nothing(cpu_as_gpu):
    layer, x = sk.LSTM(4, 5, num_layers=2), torch.randn(3, 4)
    layer.backend = "cuda"
    y, state = torch.zeros(3, 5), (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    with torch.no_grad(), NoWaiting(), NoReading():
        layer.step(x, state, out=(y, state))
    assert y.any()
