"""Outputs that are changed in place before the backward pass: residuals, activations, masks, episodes that end."""

import pytest
import torch
from torch import nn

import seqkernels as sk

CHANGES = {
    "residual": lambda y: y.add_(1),
    "activation": lambda y: torch.relu_(y),
    "mask": lambda y: y.mul_((torch.arange(y.numel()).view(y.shape) % 3 > 0).to(y)),
    "one step": lambda y: y[0].zero_(),
    "a view of it": lambda y: y.view(-1)[:7].fill_(2.0),
    "twice": lambda y: torch.sigmoid_(y.sub_(0.5)),
}


def gradients(module, x, change):
    x = x.clone().requires_grad_()
    output = module(x)
    y = output[0] if isinstance(output, tuple) else output
    change(y)
    y.sum().backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_gradients_are_those_of_a_changed_copy(name, change, options, steps, backend):
    if backend == "cudnn":
        pytest.skip("cudnn: torch refuses it there with nn.GRU as well")
    module, x = getattr(sk, name)(4, 5, **options), torch.randn(steps, 3, 4)
    module.backend = backend
    twin = getattr(nn, name)(4, 5, **options)
    twin.load_state_dict(module.state_dict())
    expected = gradients(Copied(twin), x, change)
    torch.testing.assert_close(gradients(module, x, change), expected, rtol=1e-4, atol=1e-5)


class Copied(nn.Module):
    """A module whose output is a copy, which torch lets everybody change."""

    def __init__(self, module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0].clone()


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_state_is_zeroed_where_an_episode_ends(name):
    torchs, ours = getattr(nn, name)(4, 5), getattr(sk, name)(4, 5)
    ours.load_state_dict(torchs.state_dict())
    x, found = torch.randn(4, 3, 4), []
    for cell in (torchs, ours):
        state = None
        for step in x:
            state = cell(step, state)
            for part in state if isinstance(state, tuple) else (state,):
                if cell is ours:
                    part[1] = 0
            if cell is torchs:
                mask = torch.tensor([[1.0], [0.0], [1.0]])
                state = tuple(part * mask for part in state) if isinstance(state, tuple) else state * mask
        sum(part.sum() for part in (state if isinstance(state, tuple) else (state,))).backward()
        found.append([parameter.grad for parameter in cell.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_a_compiled_model_may_change_its_output():
    module, x = sk.GRU(4, 5), torch.randn(6, 3, 4)

    def residual(x):
        y = module(x)[0]
        y += 1
        return y.sigmoid_().sum()

    expected = torch.autograd.grad(residual(x), list(module.parameters()))
    compiled = torch.compile(residual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), list(module.parameters())), expected)


OPTIONS = {
    "masks": {"zoneout": 0.3, "recurrent_dropout": 0.2},
    "layer norm": {"layer_norm": True},
}


@pytest.mark.parametrize(("name", "compiled"), [("GRU", False), ("GRU", True), ("LSTM", False)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_so_may_be_those_of_layers_with_options(name, options, compiled, backend):
    module, x = getattr(sk, name)(4, 5, **options), torch.randn(6, 3, 4)
    try:
        module.backend = backend
        module(x)
    except ValueError as refused:
        pytest.skip(str(refused))

    def residual(x, copied=False):
        torch.manual_seed(0)  # which draws the masks
        y = module(x)[0]
        y = y.clone() if copied else y
        y += 1
        return y.sigmoid_().sum()

    expected = torch.autograd.grad(residual(x, copied=True), list(module.parameters()))
    run = torch.compile(residual, backend="aot_eager") if compiled else residual
    torch.testing.assert_close(torch.autograd.grad(run(x), list(module.parameters())), expected)


def test_checkpointed_and_twice_differentiated_outputs_may_be_changed_as_well():
    module, x = sk.GRU(4, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((module(x)[0] * 2).square().sum(), x)[0]

    def changed(x):
        return module(x)[0].mul_(2)

    kept = torch.utils.checkpoint.checkpoint(changed, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(kept.square().sum(), x)[0], expected)
    torch.autograd.gradgradcheck(changed, (x,), fast_mode=True)


def test_nothing_is_computed_again_where_nothing_changed(monkeypatch):
    from seqkernels import ops

    calls = []
    forward = ops._FORWARD["torch_eager"]
    monkeypatch.setitem(ops._FORWARD, "torch_eager", lambda *args: calls.append(1) or forward(*args))
    for name, change, steps, expected in (
        ("GRU", lambda y: y, 6, 1),
        ("GRU", lambda y: y.add_(1), 6, 2),
        ("GRU", lambda y: y.add_(1), 1, 1),  # of one step nobody reads y
        ("LSTM", lambda y: y.add_(1), 1, 1),
        ("RNN", lambda y: y.add_(1), 1, 2),  # but an RNN's is all that is saved of it
    ):
        module = getattr(sk, name)(4, 5)
        module.backend = "torch_eager"
        calls.clear()
        gradients(module, torch.randn(steps, 3, 4), change)
        assert len(calls) == expected, (name, steps)
