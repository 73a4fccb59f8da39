"""The CUDA kernels of layers with layer norm, as they run on a GPU or in the emulator, beside torch operations in
float64 (tests/support/norms.py)."""

import pytest
import torch
from cuda_paths import SINGLE_CTA, STEPWISE, THIS_GPU, faulty, path
from norms import arguments, assert_rounding_alone, both_passes, results
from operators import BACKENDS, CELLS
from options import assert_derivatives

import seqkernels as sk
from seqkernels._ops import ops
from seqkernels.backends.cuda.launch import PassLaunch

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS, reason="neither a GPU with CUDA kernels nor an emulator, which `make test` builds"
)
BOTH_PATHS = pytest.mark.parametrize("launch", [STEPWISE, SINGLE_CTA], ids=["stepwise", "single CTA"])
OF_SUM = pytest.mark.parametrize("of_sum", [False, True], ids=["each", "sum"])


def of_both(launch: PassLaunch) -> list[int]:
    """A plan of both passes."""
    return [0, *launch, *launch]


def assert_right(cell: str, layer: list, rest: list, launch: PassLaunch = STEPWISE) -> None:
    assert_rounding_alone(*results("cuda", cell, layer, rest, of_both(launch)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@OF_SUM
@pytest.mark.parametrize("cell", CELLS)
def test_norms_as_specified(cell, of_sum, dtype):
    for masked, bias in ((True, True), (False, False)):
        assert_right(cell, *arguments(cell, of_sum, masked, bias=bias, dtype=dtype))
        assert_right(cell, *arguments(cell, of_sum, masked, None, bias=bias, directions=1, dtype=dtype))


@pytest.mark.parametrize("hidden", [5, 31, 64, 65, 128])
@OF_SUM
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_single_cta_as_specified(cell, of_sum, hidden):
    for masked in (True, False):
        given = arguments(cell, of_sum, masked, (4, 3, 1), bias=masked, hidden=hidden)
        assert_right(cell, *given, SINGLE_CTA._replace(tile=3))
    assert_right(cell, *arguments(cell, of_sum, True, None, hidden=hidden, directions=1), SINGLE_CTA)


@OF_SUM
@pytest.mark.parametrize("cell", CELLS)
def test_more_units_than_threads(cell, of_sum):
    assert_right(cell, *arguments(cell, of_sum, True, (2, 1), hidden=259))


@pytest.mark.parametrize("name", range(4), ids=["recurrent", "candidate", "zoneout_h", "zoneout_c"])
@BOTH_PATHS
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_each_mask_alone(cell, launch, name):
    layer, (batch_sizes, *masks, of_sum) = arguments(cell, False, masked=True)
    one = [mask if k == name else None for k, mask in enumerate(masks)]
    assert_right(cell, layer, [batch_sizes, *one, of_sum], launch)


@BOTH_PATHS
def test_sizes_of_zero(launch):
    for cell, of_sum in (("lstm", False), ("gru", True)):
        layer, rest = arguments(cell, of_sum, masked=True, batch_sizes=(2, 1))
        assert_right(cell, layer, [torch.tensor([0, 0]), *rest[1:]], launch)
        assert_right(cell, *arguments(cell, of_sum, True, (0,), spare=0), launch)
        assert_right(cell, *arguments(cell, of_sum, True, hidden=0), launch)
        assert_right(cell, *arguments(cell, of_sum, True, (2, 2), spare=0), launch)


@BOTH_PATHS
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_no_step_uses_reaches_nothing(cell, launch):
    """Rows behind all steps that are not finite, also of zoneout, and sequences that never run, some of a tile and
    whole tiles."""
    layer, rest = arguments(cell, cell == "gru", masked=True, batch_sizes=(5, 5), spare=0, hidden=17)
    for sizes in (torch.tensor([3, 1]), torch.tensor([1, 0])):
        for rows in (layer[0], *rest[3:5]):
            if rows is not None:
                rows[sizes.sum() :] = torch.nan
        tile = 2 if launch == SINGLE_CTA else 0
        assert_right(cell, layer, [sizes, *rest[1:]], launch._replace(tile=tile))


@BOTH_PATHS
@OF_SUM
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sizes_that_only_the_gpu_knows(cell, of_sum, launch, sizes_on_gpu):
    assert_right(cell, *arguments(cell, of_sum, masked=True), launch)


@BOTH_PATHS
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_no_order_of_threads_changes_a_bit(cell, launch, emulator):
    layer, rest = arguments(cell, False, masked=True, hidden=33)
    expected, _ = both_passes("cuda", cell, layer, rest, of_both(launch))
    for seed in range(3):
        emulator.seed(seed)
        found, _ = both_passes("cuda", cell, layer, rest, of_both(launch))
        assert all(torch.equal(ours, first) for ours, first in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_where_the_weights_lie_changes_no_bit(cell, shared_memory):
    """Behind what warps exchange; with less shared memory fewer of them, down to one group."""
    layer, rest = arguments(cell, False, masked=True, batch_sizes=(2, 1), hidden=127)
    found = []
    for bytes_of_a_block in (THIS_GPU.shared_memory, 99 << 10, 68 << 10):
        shared_memory(bytes_of_a_block)
        found.append(both_passes("cuda", cell, layer, rest, of_both(SINGLE_CTA))[0])
    first, *others = found
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@BOTH_PATHS
def test_a_missing_barrier_is_found(launch, emulator):
    layer, rest = arguments("lstm", False, masked=False, hidden=40)
    y, h_n, c_n, *kept = ops.layer_norm_forward.cuda("lstm", *layer, *rest, True, of_both(launch))
    passes = [(ops.layer_norm_forward.cuda, 4, (*layer, *rest, True))]  # with the barriers of a step
    back = 2 if launch == STEPWISE else 3
    passes += [(ops.layer_norm_backward.cuda, back, (y, h_n, c_n, *layer, *rest, y, *kept, True))]
    for run, barriers, args in passes:
        for event in range(barriers):
            with pytest.raises(RuntimeError, match=r"unwritten|race|divergence"):
                faulty(emulator, run, "barrier", event)("lstm", *args, of_both(launch))


def test_where_a_path_has_no_layer_norm_it_says_so():
    for cell, more, launch, sentence in (
        ("ligru", {}, SINGLE_CTA, "no single CTA kernel with layer norm for the cell ligru in float32"),
        ("gru", {"dtype": torch.float64}, SINGLE_CTA, "no single CTA kernel with layer norm for the cell gru in float"),
        ("gru", {"hidden": 130}, SINGLE_CTA, "no single CTA kernel for 130 hidden units in float32"),
        ("gru", {"hidden": 70}, path("cluster", units=64), "no kernel for several blocks has layer norm"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            both_passes("cuda", cell, *arguments(cell, False, True, **more), of_both(launch))


@BOTH_PATHS
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(launch):
    layer, rest = arguments("gru", False, masked=False, batch_sizes=None, directions=1)
    gates_x, *parameters, h_0, c_0 = layer
    run, plan = ops.layer_norm_forward.cuda, of_both(launch)
    y, *_ = run("gru", *layer, *rest, False, plan)
    alone, *_ = run("gru", gates_x[2::4], *parameters, h_0[:, 2:3], c_0, *rest, False, plan)
    torch.testing.assert_close(alone, y[2::4])


def test_what_does_not_fit_is_refused():
    layer, rest = arguments("gru", False, masked=True)
    run = ops.layer_norm_forward.cuda
    low = [t if t is None else t.bfloat16() for t in layer]
    with pytest.raises(RuntimeError, match="float32 or float64"):
        run("gru", *low, *rest, True, [0])
    with pytest.raises(RuntimeError, match=r"scale is \[2, 15\], got \[2, 14\]"):
        run("gru", *layer[:2], layer[2][:, 1:], *layer[3:], *rest, True, [0])
    with pytest.raises(RuntimeError, match="c_0 goes with an LSTM and only with it"):
        run("gru", *layer[:7], layer[6], *rest, True, [0])
    with pytest.raises(RuntimeError, match="zoneout_h has another shape than"):
        run("gru", *layer, *rest[:3], rest[3][1:], *rest[4:], True, [0])
    with pytest.raises(RuntimeError, match="scale_c goes with an LSTM only"):
        run("gru", *layer[:4], torch.ones(2, 5), *layer[5:], *rest, True, [0])
    y, h_n, _, saved, statistics = run("gru", *layer, *rest, True, [0])
    with pytest.raises(RuntimeError, match=r"statistics is \[8, 2, 1\], got \[8, 2, 0\]"):
        of_layer = *layer, *rest, y, saved, statistics[:, :, :0], True, [0]
        ops.layer_norm_backward.cuda("gru", y, h_n, None, *of_layer)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_operators_keep_what_torch_asks_of_them(cell):
    layer, rest = arguments(cell, cell == "gru", masked=True, dtype=torch.float64)
    layer = [t if t is None else t.requires_grad_() for t in layer]
    torch.library.opcheck(ops.layer_norm_forward.cuda, (cell, *layer, *rest, True, [0]))
    y, h_n, c_n, *kept = (t.detach() for t in ops.layer_norm_forward.cuda(cell, *layer, *rest, True, [0]))
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for wants_w_hh in (True, False):
        args = cell, y, h_n, c_n if cell == "lstm" else None, *layer, *rest, y, *kept, wants_w_hh, [0]
        torch.library.opcheck(ops.layer_norm_backward.cuda, args, test_utils=checks)


def layer_of(cell: str, norm: bool | str, **more):
    torch.manual_seed(0)
    return getattr(sk, cell)(3, 6, **{"bidirectional": True, "layer_norm": norm, "dtype": torch.float64} | more)


MODULES = pytest.mark.parametrize(
    ("cell", "norm"), [("LSTM", True), ("LSTM", "gates"), ("GRU", True), ("GRU", "gates"), ("RNN", True)]
)


@MODULES
def test_layers_run_them(cell, norm):
    """With the masks that torch_eager draws from the same seed."""
    layer = layer_of(cell, norm, num_layers=2, zoneout=0.3)
    for lengths in (None, torch.tensor([2, 0, 4])):
        found = []
        for layer.backend in ("cuda", "torch_eager"):
            torch.manual_seed(1)
            x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
            output, _ = layer(x, lengths=lengths)
            found.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])])
        torch.testing.assert_close(*found)


def test_a_layer_in_16_bits_is_computed_in_float32():
    layer, x = layer_of("GRU", True, dtype=torch.bfloat16), torch.randn(4, 3, 3).bfloat16()
    found = []
    for layer.backend in ("cuda", "torch_eager"):
        found.append(layer(x)[0])
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("cell", "norm"), [("LSTM", True), ("GRU", "gates")])
def test_gradients_of_gradients(cell, norm):
    layer = layer_of(cell, norm, bidirectional=False, zoneout=0.2, recurrent_dropout=0.3)
    layer.backend = "cuda"
    assert_derivatives(layer, torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True))


def test_explain_says_how_they_run():
    layer, x = layer_of("LSTM", True, zoneout=0.1), torch.randn(4, 3, 3, dtype=torch.float64)
    layer.backend = "cuda"
    assert str(sk.explain(layer, x)).startswith("cuda: forced; stepwise")
    assert str(sk.explain(layer.float(), x.float())).startswith("cuda: forced; single CTA")
    refused = layer_of("GRU", True, blocks=2)
    refused.backend = "cuda"
    with pytest.raises(ValueError, match="it has no kernel with layer_norm, blocks"):
        refused(x)
