"""Layers with layer norm (`seqkernels.layer_norm_ops`) by the Triton kernels, beside torch operations in float64
(tests/support/norms.py)."""

import pytest
import torch
from norms import arguments, assert_rounding_alone, results
from operators import BACKENDS, CELLS, nan_in_fresh_memory, to_float64

import seqkernels as sk
from seqkernels._ops import ops
from seqkernels.backends.triton import norm_host
from seqkernels.backends.triton.tiles import Launch
from seqkernels.hardware import NO_TRITON

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason=NO_TRITON)


@pytest.fixture(params=["resident", "stepwise"])
def path(request, monkeypatch) -> str:
    tile = (16, 32, 8) if request.param == "resident" else (2, 32, 4)
    monkeypatch.setattr(norm_host, "launch_of", lambda *_: Launch(False, request.param == "resident", *tile))
    return request.param


def assert_right(cell: str, layer: list, rest: list) -> None:
    assert_rounding_alone(*results("triton", cell, layer, rest))


@pytest.mark.parametrize("of_sum", [False, True], ids=["each", "sum"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_norms_and_masks_as_specified(cell, of_sum, path):
    assert_right(cell, *arguments(cell, of_sum, masked=True))


@pytest.mark.slow
@pytest.mark.parametrize("of_sum", [False, True], ids=["each", "sum"])
@pytest.mark.parametrize("cell", CELLS)
def test_norms_as_specified(cell, of_sum, path):
    with nan_in_fresh_memory():
        assert_right(cell, *arguments(cell, of_sum, masked=False, bias=False))


@pytest.mark.slow
def test_other_cells_with_masks_as_specified(path):
    for cell in ("rnn_tanh", "ligru"):
        assert_right(cell, *arguments(cell, True, masked=True))


def test_sequences_of_no_steps(path):
    layer, rest = arguments("lstm", False, masked=True, batch_sizes=(2, 1))
    rest[0] = torch.tensor([0, 0])
    assert_right("lstm", layer, rest)


@pytest.mark.slow
def test_the_operators_keep_what_torch_asks_of_them():
    layer, rest = arguments("lstm", False, masked=True)
    layer = [t.requires_grad_() for t in layer]
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(ops.layer_norm_forward.triton, ("lstm", *layer, *rest, True, [0]), test_utils=checks)
    y, h_n, c_n, *kept = (t.detach() for t in ops.layer_norm_forward.triton("lstm", *layer, *rest, True, [0]))
    args = "lstm", y, h_n, c_n, *layer, *rest, y, *kept, True, [0]
    torch.library.opcheck(ops.layer_norm_backward.triton, args, test_utils=checks)


def test_what_does_not_fit_is_refused():
    layer, rest = arguments("gru", False, masked=True)
    run = ops.layer_norm_forward.triton
    with pytest.raises(RuntimeError, match="takes float32"):
        run("gru", *to_float64(layer), *rest, True, [0])
    with pytest.raises(RuntimeError, match=r"scale is \[2, 15\], got \[2, 14\]"):
        run("gru", *layer[:2], layer[2][:, 1:], *layer[3:], *rest, True, [0])
    with pytest.raises(RuntimeError, match="c_0 goes with an LSTM and only with it"):
        run("gru", *layer[:7], layer[6], *rest, True, [0])
    with pytest.raises(RuntimeError, match="gates_x of 2"):
        run("gru", layer[0].flatten(1), *layer[1:], *rest, True, [0])
    with pytest.raises(RuntimeError, match="one or two directions, got 3"):
        run("gru", *layer[:6], torch.zeros(3, 4, 5), None, *rest, True, [0])
    with pytest.raises(RuntimeError, match="scale_c goes with an LSTM only"):
        run("gru", *layer[:4], torch.ones(2, 5), *layer[5:], *rest, True, [0])
    layer, rest = arguments("lstm", False, masked=True)
    with pytest.raises(RuntimeError, match="shift_c goes with scale_c"):
        run("lstm", *layer[:4], None, *layer[5:], *rest, True, [0])


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "norm"), [("LSTM", True), ("GRU", "gates")])
def test_modules_run_them(cell, norm):
    """Layers, with the masks that torch_eager draws from the same seed."""
    x, found = torch.randn(4, 3, 3), []
    for backend in ("triton", "torch_eager"):
        torch.manual_seed(0)
        layer = getattr(sk, cell)(3, 6, num_layers=2, bidirectional=True, layer_norm=norm, zoneout=0.3)
        layer.backend = backend
        torch.manual_seed(1)
        output, _ = layer(x, lengths=torch.tensor([2, 0, 4]))
        found.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
