"""Gradients of each sample by torch.nn.utils' expanded weights, which know torch's operations alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import seqkernels as sk


class First(nn.Module):
    """The output of a layer, without its state."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)[0]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed", "with a state"])
@pytest.mark.parametrize("name, options", [("RNN", {}), ("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 2})], ids=str)
def test_gradients_of_each_sample_are_those_of_a_loop(name, options, layout, batch_first, frozen):
    layer = getattr(sk, name)(4, 5, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64, **options)
    layer.weight_ih_l0.requires_grad_(not frozen)
    wanted = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    x, lengths = torch.randn(6, 3, 4, dtype=torch.float64), [6, 4, 1] if layout == "packed" else [6, 6, 6]
    expected = []
    for b, length in enumerate(lengths):
        one = x[:length, b : b + 1]
        loss = layer(one.transpose(0, 1) if batch_first else one)[0].sum()
        expected.append(torch.autograd.grad(loss, wanted))
    x, args = x.transpose(0, 1) if batch_first else x, ()
    if layout == "packed":
        x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first)
    if layout == "with a state":
        c, h = (torch.zeros(4, 3, size, dtype=torch.float64) for size in (5, options.get("proj_size", 5)))
        args = ((h, c) if name == "LSTM" else h,)
    model = call_for_per_sample_grads(First(layer), batch_size=3, loss_reduction="sum", batch_first=batch_first)
    output = model(x, *args)
    (output.data if layout == "packed" else output).sum().backward()
    found = [parameter.grad_sample for parameter in wanted]
    torch.testing.assert_close(found, [torch.stack(grads) for grads in zip(*expected, strict=True)])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["GRU", "LiGRU", "RNNCell", "GRUCell", "LSTMCell"])
def test_what_torch_has_no_rule_for_is_refused_with_a_way_out(name, frozen):
    module = getattr(sk, name)(4, 5)
    next(module.parameters()).requires_grad_(not frozen)
    given = (torch.randn(3, 4), {}) if name.endswith("Cell") else (torch.randn(6, 3, 4), {"lengths": [6, 4, 1]})
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap"):
        call_for_per_sample_grads(module, batch_size=3)(given[0], **given[1])


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_what_opacus_asks_first_is_refused(name):
    """Its GradSampleModule asks a copy of each module that has parameters, before it trains anything."""
    with pytest.raises(RuntimeError, match=rf"Opacus' hooks cannot .* seqkernels\.{name}: use grad_sample_mode"):
        copy.deepcopy(getattr(sk, name)(4, 5)).allow_grad_accumulation()
