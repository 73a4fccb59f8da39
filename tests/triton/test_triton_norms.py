"""Layers with layer norm (`seqkernels.layer_norm_ops`) by the Triton kernels, beside the torch operations that
tests/modules/test_cell_options.py judges, in float64."""

import pytest
import torch
from operators import BACKENDS, CELLS, nan_in_fresh_memory, to_float64

import seqkernels as sk
from seqkernels._ops import ops
from seqkernels.backends import torch_steps
from seqkernels.backends.cells import CELLS as FACTS
from seqkernels.backends.torch_steps import Direction, Variant
from seqkernels.backends.triton import norm_host
from seqkernels.backends.triton.tiles import Launch
from seqkernels.double_backward import derivatives
from seqkernels.hardware import NO_TRITON

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason=NO_TRITON)
H, EPS = 5, torch.finfo(torch.float32).eps


@pytest.fixture(params=["resident", "stepwise"])
def path(request, monkeypatch) -> str:
    tile = (16, 32, 8) if request.param == "resident" else (2, 32, 4)
    monkeypatch.setattr(norm_host, "launch_of", lambda *_: Launch(False, request.param == "resident", *tile))
    return request.param


def arguments(cell: str, of_sum: bool, masked: bool, batch_sizes=(4, 3, 0), spare=1, bias=True) -> tuple[list, list]:
    """Those with gradients, and those behind them; both directions."""
    torch.manual_seed(0)
    D, B, N, GH = 2, batch_sizes[0], sum(batch_sizes) + spare, FACTS[cell].gates * H
    has_c, norms_c = cell == "lstm", cell == "lstm" and not of_sum

    def random(*size: int, wanted: bool = True):
        return torch.randn(size) if wanted else None

    def mask(*size: int, wanted: bool = True):
        return torch.rand(size) if masked and wanted else None

    layer = [
        random(N, D, GH),
        random(D, GH, H) / 2,
        random(D, GH),
        random(D, GH, wanted=bias),
        random(D, H, wanted=norms_c),
        random(D, H, wanted=norms_c and bias),
        random(D, B, H),
        random(D, B, H, wanted=has_c),
    ]
    masks = [
        mask(D, B, H),
        mask(D, B, H, wanted=FACTS[cell].saved_blocks > 0),
        mask(N, D, H),
        mask(N, D, H, wanted=has_c),
    ]
    return layer, [torch.tensor(batch_sizes), *masks, of_sum]


def results(cell: str, layer: list, rest: list) -> tuple[list, list]:
    """Outputs and gradients, ours and in float64."""
    ours = [t if t is None else t.clone().requires_grad_() for t in layer]
    y, h_n, c_n, *_ = ops.layer_norm_forward.triton(cell, *ours, *rest, True, [0])
    grads = [torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n) if cell == "lstm" else None]
    wanted = [t for t in ours if t is not None]
    found = [y, h_n, c_n, *derivatives((y, h_n, c_n), grads, wanted, [True] * len(wanted), False)]

    gates_x, *parameters, h_0, c_0 = exact = [t if t is None else t.double().requires_grad_() for t in layer]
    directions = [
        Direction(of_x, *(None if t is None else t[d] for t in parameters)) for d, of_x in enumerate(gates_x.unbind(1))
    ]
    batch_sizes, *masks, of_sum = rest
    variant = Variant("gates" if of_sum else True, 1, *to_float64(masks))
    right = torch_steps.sweep(cell, directions, h_0, c_0, batch_sizes, variant)
    wanted, grads = [t for t in exact if t is not None], to_float64(grads)
    return found, [*right, *derivatives(right, grads, wanted, [True] * len(wanted), False)]


def assert_rounding_alone(found: list, right: list) -> None:
    for value, exact in zip(found, right, strict=True):
        assert (value.double() - exact).norm() <= 16 * EPS * exact.norm().clamp(min=1e-30)


@pytest.mark.parametrize("of_sum", [False, True], ids=["each", "sum"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_norms_and_masks_as_specified(cell, of_sum, path):
    assert_rounding_alone(*results(cell, *arguments(cell, of_sum, masked=True)))


@pytest.mark.slow
@pytest.mark.parametrize("of_sum", [False, True], ids=["each", "sum"])
@pytest.mark.parametrize("cell", CELLS)
def test_norms_as_specified(cell, of_sum, path):
    with nan_in_fresh_memory():
        found, right = results(cell, *arguments(cell, of_sum, masked=False, bias=False))
    assert_rounding_alone(found, right)


@pytest.mark.slow
def test_other_cells_with_masks_as_specified(path):
    for cell in ("rnn_tanh", "ligru"):
        assert_rounding_alone(*results(cell, *arguments(cell, True, masked=True)))


def test_sequences_of_no_steps(path):
    layer, rest = arguments("lstm", False, masked=True, batch_sizes=(2, 1))
    rest[0] = torch.tensor([0, 0])
    assert_rounding_alone(*results("lstm", layer, rest))


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
        run("gru", *layer[:6], torch.zeros(3, 4, H), None, *rest, True, [0])
    with pytest.raises(RuntimeError, match="scale_c goes with an LSTM only"):
        run("gru", *layer[:4], torch.ones(2, H), *layer[5:], *rest, True, [0])
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
