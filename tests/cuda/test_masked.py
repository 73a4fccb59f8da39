"""The CUDA kernels of layers with masks (zoneout, dropout of h in products and of candidates), as they run on a GPU or
in the emulator: against plain torch operations in float64, which test_cell_options judges by the specification."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import WITH_RELU
from cuda_paths import SINGLE_CTA, STEPWISE, path
from operators import BACKENDS, SHAPES, Call, to_float64
from options import assert_derivatives
from torch import Tensor

import seqkernels as sk
from seqkernels.backends import cells, torch_steps
from seqkernels.backends.torch_steps import Variant
from seqkernels.double_backward import derivatives

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS, reason="neither a GPU with CUDA kernels nor an emulator, which `make test` builds"
)

CELLS = [cell.name for cell in cells.CELLS.values() if cell.saved_blocks]
MASKS = {
    "recurrent": ("recurrent",),
    "candidate": ("candidate",),
    "zoneout": ("zoneout_h", "zoneout_c"),
    "zoneout of h": ("zoneout_h",),
    "all": ("recurrent", "candidate", "zoneout_h", "zoneout_c"),
}
OPERATORS = torch.ops.seqkernels


def masks_of(call: Call, names: tuple[str, ...]) -> list[Tensor | None]:
    """In the order of the operator; of zoneout some units stay for sure, some for sure not, and some in part."""
    _, x, _, h_0, c_0, *_ = call.arguments()
    generator, dtype = torch.Generator("cpu").manual_seed(7), torch.promote_types(call.dtype, torch.float32)

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=dtype, device="cpu").to(x.device)

    def dropout(size) -> Tensor:
        return (random(*size) > 0.3).to(dtype) / 0.7

    def stays(tensor) -> Tensor:
        return (2 * random(x.shape[0], call.directions, call.hidden) - 0.5).clamp(0, 1)

    made = {
        "recurrent": lambda: dropout(h_0.shape),
        "candidate": lambda: dropout(h_0.shape),
        "zoneout_h": lambda: stays(h_0),
        "zoneout_c": lambda: None if c_0 is None else stays(c_0),
    }
    return [make() if name in names else None for name, make in made.items()]


def gradients_of(call: Call, results) -> list[Tensor | None]:
    generator = torch.Generator("cpu").manual_seed(call.seed + 1)
    found = [torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x) for x in results]
    return found if call.cell == "lstm" else [*found[:2], None]


def both_passes(call: Call, masks, launch=STEPWISE) -> list[Tensor]:
    """Results and gradients, but for what is saved."""
    cell, *layer, save = call.arguments()
    *pass_, _ = launch  # these operators know no stacks
    *results, saved = OPERATORS.cuda_masked_forward(cell, *layer, *masks, save, *pass_)
    grads = gradients_of(call, results)
    backward = OPERATORS.cuda_masked_backward(cell, *grads, *layer, *masks, results[0], saved, True, True, *pass_)
    grad_x, grad_weights, *grad_states = backward
    return [*results, grad_x, *grad_weights, *grad_states]


def in_float64(call: Call, masks) -> list[Tensor]:
    cell, x, weights, h_0, c_0, batch_sizes, _ = to_float64(call.arguments())
    leaves = [t.requires_grad_() for t in (x, *weights, h_0, *([] if c_0 is None else [c_0]))]
    variant = Variant(False, 1, *to_float64(masks))
    results = torch_steps.forward(cell, x, weights, (), h_0, c_0, batch_sizes, variant)
    grads = [None if g is None else g.double() for g in gradients_of(call, [r.to(call.dtype) for r in results])]
    gradients = derivatives(results, grads, leaves, [True] * len(leaves), False)
    found = [*results, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))]
    return found if call.cell == "lstm" else [*found, x.new_zeros(*h_0.shape[:2], 0)]


def assert_rounding_alone(call: Call, masks, launch=STEPWISE) -> None:
    found, expected = both_passes(call, masks, launch), in_float64(call, masks)
    # In 16 bits a relu that rounds across zero has another gradient, which is no error.
    judged = slice(3) if call.cell in WITH_RELU and call.dtype.itemsize == 2 else slice(None)
    for ours, right in list(zip(found, expected, strict=True))[judged]:
        error = (ours.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert ours.dtype == call.dtype and error <= 16 * torch.finfo(call.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", ["two directions", "ragged both ways", "spare rows", "one row off the vectors"])
@pytest.mark.parametrize("cell", CELLS)
def test_masks_err_by_rounding_alone(cell, shape, name, dtype):
    call = Call(cell, dtype=dtype, **SHAPES[shape])
    assert_rounding_alone(call, masks_of(call, MASKS[name]))


# Those of which a single CTA has kernels with masks.
IN_ONE_LAUNCH = pytest.mark.parametrize(
    ("cell", "dtype"), list(itertools.product(["gru", "lstm"], [torch.float32, torch.bfloat16])), ids=str
)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", ["two directions", "ragged both ways", "spare rows", "one row off the vectors"])
@IN_ONE_LAUNCH
def test_a_single_cta_with_masks_errs_by_rounding_alone(cell, dtype, shape, name):
    call = Call(cell, dtype=dtype, **SHAPES[shape])
    assert_rounding_alone(call, masks_of(call, MASKS[name]), SINGLE_CTA)


@pytest.mark.parametrize("hidden", [31, 64, 65, 128, 130, 256])
@IN_ONE_LAUNCH
def test_every_width_of_a_single_cta_with_masks(cell, dtype, hidden):
    if hidden > 128 and dtype == torch.float32:
        pytest.skip("there is no single CTA kernel for it")
    call = Call(cell, 2, 5, 3, hidden, batch_sizes=(5, 3, 1), bias=False, dtype=dtype)
    assert_rounding_alone(call, masks_of(call, MASKS["all"]), SINGLE_CTA._replace(tile=3))


def test_where_no_single_cta_has_masks_layers_say_so():
    for call, launch, sentence in (
        (Call("ligru", dtype=torch.float32), SINGLE_CTA, "no single CTA kernel with masks for the cell ligru in float"),
        (Call("gru", dtype=torch.float16), SINGLE_CTA, "no single CTA kernel with masks for the cell gru in float16"),
        (Call("gru", hidden=70, dtype=torch.float32), path("cluster", units=64), "for several blocks has masks"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            both_passes(call, masks_of(call, MASKS["all"]), launch)


@pytest.mark.parametrize("names", [("recurrent",), ("zoneout_h",), ("recurrent", "zoneout_h")], ids=" and ".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["ragged both ways", "spare rows"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu"])
def test_an_rnn_has_dropout_of_h_in_its_products_and_zoneout(cell, shape, dtype, names):
    """Of zoneout it saves the h that may be replaced."""
    call = Call(cell, dtype=dtype, **SHAPES[shape])
    assert_rounding_alone(call, masks_of(call, names))


LARGE = ("many rows", "deep", "long", "many units", "one long sequence", "two long sequences both ways")


@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in LARGE])
@pytest.mark.parametrize("cell", CELLS)
def test_every_shape_has_masks(cell, shape):
    call = Call(cell, bias=shape != "two directions", **SHAPES[shape])
    assert_rounding_alone(call, masks_of(call, MASKS["all"]))


BY_EITHER = pytest.mark.parametrize(
    ("cell", "launch"), [*((cell, STEPWISE) for cell in CELLS), ("gru", SINGLE_CTA), ("lstm", SINGLE_CTA)], ids=str
)


@pytest.mark.parametrize(
    "shape", ["ragged", "ragged both ways", "empty sequences", "steps in which nothing runs", "spare rows"]
)
@BY_EITHER
def test_masks_of_sizes_that_only_the_gpu_knows(cell, launch, shape, sizes_on_gpu):
    call = Call(cell, dtype=torch.float32, **SHAPES[shape])
    assert_rounding_alone(call, masks_of(call, MASKS["all"]), launch)


@BY_EITHER
def test_no_order_of_threads_changes_a_bit_of_masked_layers(cell, launch, emulator):
    call = Call(cell, 2, 11, 4, 33, batch_sizes=(11, 9, 9, 2), dtype=torch.float32)
    masks = masks_of(call, MASKS["all"])
    expected = both_passes(call, masks, launch)
    for seed in range(3):
        emulator.seed(seed)
        for ours, first in zip(both_passes(call, masks, launch), expected, strict=True):
            assert torch.equal(ours, first)


def test_masks_that_do_not_fit_say_so():
    call = Call("gru", dtype=torch.float32)
    recurrent, candidate, zoneout_h, _ = masks_of(call, MASKS["all"])
    for masks, sentence in (
        ((recurrent[:, :1], None, None, None), "recurrent has another shape than"),
        ((None, candidate.double(), None, None), "candidate has not the type of computation"),
        ((None, None, zoneout_h, zoneout_h), "zoneout_c goes with an LSTM only"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            both_passes(call, masks)
    with pytest.raises(RuntimeError, match="candidate goes with gated cells only"):
        both_passes(replace(call, cell="rnn_tanh"), (None, candidate, None, None))


OPTIONS = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "candidate": {"candidate_dropout": 0.4},
    "all, in blocks": {"zoneout": 0.2, "recurrent_dropout": 0.3, "candidate_dropout": 0.3, "blocks": 2},
}


def layer_of(cell: str, options: dict, **more):
    torch.manual_seed(0)
    more = {"bidirectional": True, "dtype": torch.float64} | more
    return getattr(sk, cells.CELLS[cell].display_name)(5, 6, **more, **options)


def results_by(backend: str, layer, lengths, training: bool) -> list[Tensor]:
    layer.train(training).backend = backend
    torch.manual_seed(1)
    x = torch.randn(7, 3, 5, dtype=layer.weight_ih_l0.dtype, requires_grad=True)
    output, end = layer(x, lengths=lengths)
    loss = sum(state.square().sum() for state in (output, *(end if isinstance(end, tuple) else (end,))))
    return [output, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("cell", "name"), [*itertools.product(CELLS, OPTIONS), ("rnn_tanh", "zoneout")])
def test_layers_with_options(cell, name, training):
    layer = layer_of(cell, OPTIONS[name])
    for lengths in (None, torch.tensor([4, 0, 7])):
        found, expected = (results_by(backend, layer, lengths, training) for backend in ("cuda", "torch_eager"))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_of_gradients(cell):
    layer = layer_of(cell, OPTIONS["all, in blocks"], bidirectional=False)
    layer.backend = "cuda"
    assert_derivatives(layer, torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_masked_operators_keep_what_torch_asks_of_them(cell):
    call = Call(cell, 2, 3, 4, batch_sizes=(3, 2, 1, 1))
    cell, *layer, _ = call.arguments(requires_grad=True)
    args = cell, *layer, *masks_of(call, MASKS["all"]), True, [0]
    torch.library.opcheck(OPERATORS.masked_forward.cuda, args)


def test_explain_says_how_layers_with_options_run():
    layer, x = layer_of("lstm", OPTIONS["all, in blocks"]), torch.randn(7, 3, 5, dtype=torch.float64)
    layer.backend = "cuda"
    assert str(sk.explain(layer, x)).startswith("cuda: forced; stepwise, one after another 2 blocks of units")
    layer, x = layer.float(), x.float()
    assert str(sk.explain(layer, x)).startswith("cuda: forced; single CTA, one after another 2 blocks of units")
    for options, more, reason in (
        ({"layer_norm": True, "blocks": 2}, {}, "it has no kernel with layer_norm, blocks"),
        ({"zoneout": 0.1}, {"proj_size": 2}, "it has no kernel with zoneout, proj_size"),
    ):
        refused = layer_of("lstm", options, **more)
        refused.backend = "cuda"
        with pytest.raises(ValueError, match=reason):
            refused(x.double())
