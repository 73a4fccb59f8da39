"""torch.onnx.export(dynamo=True): what ONNX Runtime computes is what the module does."""

import pytest
import torch
from operators import NO_CPU_KERNELS
from torch import nn
from torch.export import Dim

import seqkernels as sk

pytestmark = pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="ONNX Runtime is that of the CPU")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

LAYERS = {
    "RNN": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
    "GRU without bias": ("GRU", {"bias": False}),
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "LSTM learned": ("LSTM", {"learn_initial_state": True}),
}
DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


class Call(nn.Module):
    """A call with tensors alone: x, then the state where it is given, then lengths."""

    def __init__(self, layer, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *tensors):
        return self.call(self.layer, *tensors)


def flat(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for one in results for t in flat(one)]


def compare(module, exported_with, shapes, *others):
    """Export with one input, and run the result with it and others."""
    module.eval()
    program = torch.onnx.export(module, exported_with, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for inputs in (exported_with, *others):
        given = {put.name: tensor.numpy() for put, tensor in zip(session.get_inputs(), inputs, strict=True)}
        found = [torch.from_numpy(array) for array in session.run(None, given)]
        with torch.no_grad():
            torch.testing.assert_close(found, flat(module(*inputs)))
    return [node.op_type for node in program.model.graph]


def layer_of(name: str):
    torch.manual_seed(0)
    cls, options = LAYERS[name]
    layer = getattr(sk, cls)(4, 5, **options)
    if layer.learn_initial_state:
        nn.init.normal_(layer.initial_h)
    return layer


def padded(layer, steps: int, sequences: int) -> torch.Tensor:
    return torch.randn((sequences, steps, 4) if layer.batch_first else (steps, sequences, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_padded_batches_of_any_size(name):
    layer = layer_of(name)
    inputs = [(padded(layer, steps, sequences),) for steps, sequences in ((7, 3), (2, 5))]
    operators = compare(Call(layer, lambda layer, x: layer(x)), inputs[0], (DYNAMIC,), *inputs[1:])
    assert operators.count(layer.mode.split("_")[0]) == layer.num_layers


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_lengths_and_states(name):
    layer = layer_of(name)

    def inputs(steps, lengths):
        states = [torch.randn(4, len(lengths), 5) for _ in range(2 if name == "LSTM" else 1)]
        return padded(layer, steps, len(lengths)), torch.tensor(lengths), *states

    def call(layer, x, lengths, *states):
        return layer(x, states if len(states) == 2 else states[0], lengths=lengths)

    first, second = inputs(7, [7, 3, 1]), inputs(4, [0, 4])
    shapes = DYNAMIC, {0: Dim.DYNAMIC}, *({1: Dim.DYNAMIC} for _ in first[2:])
    compare(Call(layer, call), first, shapes, second)


def test_an_unbatched_sequence():
    compare(
        Call(layer_of("LSTM"), lambda layer, x: layer(x)),
        (torch.randn(7, 4),),
        ({0: Dim.DYNAMIC},),
        (torch.randn(3, 4),),
    )


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name):
    compare(Call(getattr(sk, name)(4, 5), lambda cell, x: cell(x)), (torch.randn(3, 4),), (None,))


def test_a_step():
    layer, inputs = sk.GRU(4, 5, num_layers=2), (torch.randn(3, 4), torch.randn(2, 3, 5))
    compare(Call(layer, lambda layer, x, state: layer.step(x, state)), inputs, (None, None))


def test_a_swapped_model():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "gru": nn.GRU(4, 5)})
    sk.swap_in(model)
    compare(Call(model, lambda model, x: model["gru"](model["embed"](x))), (torch.randint(9, (7, 3)),), (DYNAMIC,))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (sk.LSTM(4, 5, proj_size=2), "no projection"),
        (sk.LiGRU(4, 5), "no operator for LiGRU"),
        (sk.GRU(4, 5, return_all_states=True), "return_all_states"),
    ],
)
def test_what_onnx_has_not_is_refused(layer, message):
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=message):
        torch.onnx.export(layer.eval(), (torch.randn(7, 3, 4),), dynamo=True, verbose=False)


@pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=NO_CPU_KERNELS or "-")
def test_quantized_layers_are_refused():
    layer = sk.GRU(4, 5)
    sk.quantize_(layer)
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="before quantize_"):
        torch.onnx.export(layer, (torch.randn(7, 3, 4),), dynamo=True, verbose=False)
