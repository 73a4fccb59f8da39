"""Layers with masks (`seqkernels.masked_ops`) by the Triton kernels, beside the torch operations that
tests/modules/test_cell_options.py judges, in float64."""

import pytest
import torch
from operators import BACKENDS, ON_GPU, Call, nan_in_fresh_memory, to_float64
from torch import Tensor

import seqkernels as sk
from seqkernels._ops import ops
from seqkernels.backends import torch_steps
from seqkernels.backends.torch_steps import Variant
from seqkernels.backends.triton import layer as triton_layer
from seqkernels.backends.triton.tiles import Launch
from seqkernels.double_backward import derivatives
from seqkernels.hardware import NO_TRITON

pytestmark = pytest.mark.skipif("triton" not in BACKENDS, reason=NO_TRITON)
MASKS = ("recurrent", "candidate", "zoneout_h", "zoneout_c")
OF_RNN = "recurrent", "zoneout_h"
OF_CELL = {"gru": MASKS[:3], "lstm": MASKS, "ligru": MASKS[:3], "rnn_tanh": OF_RNN, "rnn_relu": OF_RNN}
RAGGED = {"directions": 2, "sequences": 4, "batch_sizes": (4, 3, 0), "spare_rows": 1, "dtype": torch.float32}


@pytest.fixture(params=["resident", "stepwise"])
def path(request, monkeypatch) -> str:
    if request.param == "stepwise":
        monkeypatch.setattr(triton_layer, "launch_of", lambda call, gpu: Launch(call.tf32, False, 4, 128, 4))
    return request.param


def masks_of(call: Call, names) -> list[Tensor | None]:
    generator = torch.Generator("cpu").manual_seed(7)
    _, x, _, h_0, *_ = call.arguments()
    of_sequences, of_rows = tuple(h_0.shape), (len(x), call.directions, call.hidden)

    def mask(name: str, size: tuple[int, ...]) -> Tensor | None:
        drawn = torch.rand(size, generator=generator, device="cpu").to(h_0.device)
        return drawn if name in names else None

    return [mask(name, of_rows if name.startswith("zoneout") else of_sequences) for name in MASKS]


def results(call: Call, names) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, ours and in float64."""
    cell, *layer, save = call.arguments()
    masks = masks_of(call, names)
    y, h_n, c_n, saved = ops.masked_forward.triton(cell, *layer, *masks, save, [0])
    grads = [torch.randn_like(state) for state in (y, h_n, c_n)]
    grads[2] = grads[2] if cell == "lstm" else None
    backward = ops.masked_backward.triton(cell, *grads, *layer, *masks, y, saved, True, True, [0])
    ours = [y, h_n, c_n, backward[0], *backward[1], *backward[2:]]

    x, weights, h_0, c_0, batch_sizes = to_float64(layer)
    inputs = [x, *weights, h_0, *([] if c_0 is None else [c_0])]
    for t in inputs:
        t.requires_grad_()
    variant = Variant(False, 1, *to_float64(masks))
    right = torch_steps.forward(cell, x, weights, (), h_0, c_0, batch_sizes, variant)
    given = [None if grad is None else grad.double() for grad in grads]
    gradients = derivatives(right, given, inputs, [True] * len(inputs), False)
    return ours, [*right, *gradients, *([torch.zeros_like(ours[-1])] if c_0 is None else [])]


def assert_rounding_alone(ours: list[Tensor], right: list[Tensor], eps: float) -> None:
    for value, exact in zip(ours, right, strict=True):
        assert (value.double() - exact).norm() <= 8 * eps * exact.norm().clamp(min=1e-30)


@pytest.mark.parametrize("cell", OF_CELL)
def test_all_masks_as_specified(cell, path):
    assert_rounding_alone(*results(Call(cell, **RAGGED), OF_CELL[cell]), torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", MASKS)
def test_each_mask_as_specified(name, path):
    call = Call("lstm", sequences=3, steps=3, bias=False, dtype=torch.float32)
    assert_rounding_alone(*results(call, (name,)), torch.finfo(torch.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_16_bits_err_by_rounding_alone(cell, dtype, path):
    call = Call(cell, **RAGGED | {"dtype": dtype, "hidden": 29})
    assert_rounding_alone(*results(call, OF_CELL[cell]), torch.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sizes_that_only_the_device_knows(cell, monkeypatch):
    """The host then multiplies for all sequences in every step; the kernels leave alone what does not run."""
    monkeypatch.setattr(triton_layer, "launch_of", lambda call, gpu: Launch(call.tf32, False, 4, 128, 4))
    steps = triton_layer.Layer.steps

    def all_sequences(layer, back=False):
        layer.known = [layer.B] * layer.T
        return steps(layer, back)

    monkeypatch.setattr(triton_layer.Layer, "steps", all_sequences)
    assert_rounding_alone(*results(Call(cell, **RAGGED), OF_CELL[cell]), torch.finfo(torch.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"batch_sizes": (0, 0)}], ids=["ragged", "all sequences empty"])
def test_nothing_is_read_before_it_is_written(sizes, path):
    with nan_in_fresh_memory():
        ours, right = results(Call("lstm", **RAGGED | sizes), MASKS)
    assert_rounding_alone(ours, right, torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_the_operators_keep_what_torch_asks_of_them():
    call = Call("lstm", **RAGGED)
    cell, *layer, save = call.arguments(requires_grad=True)
    torch.library.opcheck(ops.masked_forward.triton, (cell, *layer, *masks_of(call, MASKS), save, [0]))


def test_masks_that_do_not_fit_are_refused():
    call = Call("gru", **RAGGED)
    cell, *layer, save = call.arguments()
    masks = masks_of(call, MASKS)
    run = ops.masked_forward.triton
    with pytest.raises(RuntimeError, match="zoneout_c goes with an LSTM only"):
        run(cell, *layer, *masks, save, [0])
    with pytest.raises(RuntimeError, match=r"candidate is \[2, 4, 5\], got \[2, 4, 4\]"):
        run(cell, *layer, None, masks[1][..., 1:], None, None, save, [0])
    with pytest.raises(RuntimeError, match=r"zoneout_h is torch\.float32, got torch\.float16"):
        run(cell, *layer, None, None, masks[2].half(), None, save, [0])


OPTIONS = {"zoneout": 0.3, "recurrent_dropout": 0.4, "candidate_dropout": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "more"), [("GRU", {}), ("LSTM", {"blocks": 2, "input_dropout": 0.2, "weight_dropout": 0.2})]
)
def test_modules_run_them(cell, more):
    """Layers, with the masks that torch_eager draws from the same seed."""
    x, found = torch.randn(4, 3, 3), []
    for backend in ("triton", "torch_eager"):
        torch.manual_seed(0)
        layer = getattr(sk, cell)(3, 6, num_layers=2, bidirectional=True, **OPTIONS, **more)
        layer.backend = backend
        output, _ = layer(x, lengths=torch.tensor([2, 0, 4]))
        found.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="only a GPU has graphs and queues")
@pytest.mark.parametrize("more", [{}, {"layer_norm": True}], ids=["", "norm"])
@pytest.mark.parametrize("hidden", [64, 300], ids=["resident", "stepwise"])
def test_nothing_waits_for_the_gpu_and_a_replay_draws_other_masks(hidden, more):
    layer = sk.LSTM(16, hidden, **OPTIONS, **more)
    layer.backend = "triton"
    x, lengths = torch.randn(12, 5, 16), torch.tensor([5, 12, 1, 0, 7])

    def run() -> Tensor:
        y = layer(x, lengths=lengths)[0]
        torch.autograd.grad(y.sum(), list(layer.parameters()))
        return y.detach()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = run()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(*replays)
