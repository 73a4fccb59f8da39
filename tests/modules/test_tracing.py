"""What looks at a model from outside: torch.fx, which traces it, and FlopCounterMode, which counts products."""

import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import seqkernels as sk


class Reader(nn.Module):
    """Layers and cells side by side, with and without a state that is given."""

    def __init__(self, namespace) -> None:
        super().__init__()
        self.gru = namespace.GRU(4, 5, batch_first=True)
        self.lstm = namespace.LSTM(5, 6)
        self.cells = nn.ModuleList([namespace.RNNCell(6, 6), namespace.GRUCell(6, 6), namespace.LSTMCell(6, 6)])

    def forward(self, x):
        y, h = self.gru(x)
        y, (h, c) = self.lstm(y)
        h = self.cells[1](y[-1], self.cells[0](y[0]))
        return self.cells[2](h, (h, c[0]))[0]


def test_our_modules_are_leaves_of_a_traced_graph():
    traced = {}
    for namespace in (nn, sk):
        torch.manual_seed(0)
        model, x = Reader(namespace), torch.randn(6, 3, 4)
        graph = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(graph(x), model(x))
        traced[namespace] = [(node.op, node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert traced[sk] == traced[nn] and len(traced[sk]) == 5


def test_lengths_are_part_of_the_traced_call():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = sk.GRU(4, 5)

        def forward(self, x, lengths):
            return self.gru(x, lengths=lengths)[0]

    model, x, lengths = Padded(), torch.randn(6, 3, 4), torch.tensor([6, 2, 4])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, lengths), model(x, lengths))


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_any_argument_may_be_the_traced_one(name):
    class Generator(nn.Module):
        """Its input is its own; what is traced is the state, of which a part may be constant."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = getattr(sk, name)(4, 5)
            self.register_buffer("x", torch.randn(3, 4))

        def forward(self, state):
            hx = (torch.zeros(shape), state) if name.startswith("LSTM") else state
            return self.inner(self.x, hx=hx)

    shape = (3, 5) if name.endswith("Cell") else (1, 5)
    model, state = Generator(), torch.randn(shape)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["inner"]
    for twin in (graph, pickle.loads(pickle.dumps(graph))):
        torch.testing.assert_close(twin(state), model(state))


def test_a_layer_that_is_no_part_of_a_model_cannot_be_traced():
    with pytest.raises(torch.fx.proxy.TraceError, match="GRU is one node of a graph"):
        torch.fx.symbolic_trace(sk.GRU(4, 5))


def flops(module, *args, backward=False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = module(*args)[0]
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_flops_are_those_that_torch_counts(name, options):
    x, state = torch.randn(6, 3, 4), torch.randn(4 if options else 1, 3, 5, requires_grad=True)
    torchs, ours = getattr(nn, name)(4, 5, **options), getattr(sk, name)(4, 5, **options)
    assert flops(ours, x, state) == flops(torchs, x, state) > 0
    for given in (x, x.clone().requires_grad_()):
        assert flops(ours, given, state, backward=True) == flops(torchs, given, state, backward=True)
    ours.requires_grad_(False)
    torchs.requires_grad_(False)
    x.requires_grad_()
    assert flops(ours, x, state, backward=True) == flops(torchs, x, state, backward=True)


@pytest.mark.parametrize("options", [{"zoneout": 0.1}, {"layer_norm": True}, {"layer_norm": "gates"}], ids=str)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_options_change_no_flops(name, options):
    x, sizes = torch.randn(6, 3, 4), {"input_size": 4, "hidden_size": 5, "num_layers": 2, "bidirectional": True}
    plain, ours = getattr(sk, name)(**sizes), getattr(sk, name)(**sizes, **options)
    for wanted in (True, False):
        assert flops(ours, x) == flops(plain, x) > 0
        for given in (x, x.clone().requires_grad_()):
            if wanted or given.requires_grad:
                assert flops(ours, given, backward=True) == flops(plain, given, backward=True)
        ours.requires_grad_(False)
        plain.requires_grad_(False)


def test_flops_of_a_projected_lstm():
    rows, gates, H, P, inputs = 6 * 3, 4, 5, 2, 4
    expected = 2 * rows * (gates * H * (inputs + P) + H * P)
    with torch.inference_mode():
        assert flops(sk.LSTM(inputs, H, proj_size=P), torch.randn(6, 3, inputs)) == expected


def test_the_counter_may_be_imported_before_or_after_us():
    for first, second in (("seqkernels", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "seqkernels")):
        code = f"""
import {first}, {second}, torch, seqkernels as sk
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sk.GRU(4, 5)(torch.randn(6, 3, 4))
print(counter.get_total_flops())
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert int(done.stdout) == 2 * 18 * 15 * (4 + 5)
