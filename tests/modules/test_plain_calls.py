"""The short way of plain calls on a CPU: the long way's results and errors, and nothing that it cannot do."""

import logging

import pytest
import torch
from cases import CELLS
from operators import NO_CPU_KERNELS
from short_calls import AS_THEY_LIE, Functions, Operations, assert_same, counted, freed
from torch.utils._device import DeviceContext
from torch.utils.checkpoint import checkpoint

import seqkernels as sk
from seqkernels import direct, plain_calls
from seqkernels.backends.cells import CELLS as FACTS

pytestmark = pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=str(NO_CPU_KERNELS))


def layer_of(cell: str, **options):
    torch.manual_seed(0)
    options |= {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    return getattr(sk, FACTS[cell].display_name)(4, 6, **options)


@pytest.fixture
def long_calls(monkeypatch) -> list:
    return counted(monkeypatch, "recurrent")


def outcome(layer, x, hx=None):
    """Results, gradients, or the error of a call."""
    layer.zero_grad()
    try:
        y, state = layer(x, hx)
    except Exception as error:
        return type(error), str(error)
    if y.requires_grad:
        (y.square().sum() + sum(s.sum() for s in (state if isinstance(state, tuple) else (state,)))).backward()
    found = [y, *(state if isinstance(state, tuple) else (state,)), *(p.grad for p in layer.parameters())]
    return [None if t is None else t.detach().clone() for t in found], y.stride()


OPTIONS = [
    {},
    {"bias": False},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
    {"recompute": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("gradients", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_results_are_the_long_ways(cell, options, gradients, long_calls, monkeypatch):
    layer = layer_of(cell, **options).eval()
    x = torch.randn(5, 3, 4, dtype=options.get("dtype"))
    sequences = 5 if layer.batch_first else 3
    sizes = layer.num_layers * (1 + layer.bidirectional), sequences, 6
    states = [torch.randn(sizes, dtype=x.dtype) for _ in range(FACTS[cell].states)]
    for hx in (None, states[0] if len(states) == 1 else tuple(states)):
        with torch.set_grad_enabled(gradients):
            before = len(long_calls)
            short = outcome(layer, x, hx)
            assert len(long_calls) - before == (layer.recompute or (gradients and layer.num_layers > 1))
            with monkeypatch.context() as patched:
                patched.setattr(plain_calls, "run", lambda *_, **__: None)
                assert_same(short, outcome(layer, x, hx))


WRONG = {
    "features": lambda x: (x[..., :3], None),
    "no steps": lambda x: (x[:0], None),
    "dimensions": lambda x: (x.unsqueeze(0), None),
    "dtype": lambda x: (x.double(), None),
    "integers": lambda x: (x.long(), None),
    "device": lambda x: (x.to("meta"), None),
    "sequences of hx": lambda x: (x, torch.zeros(1, 2, 6)),
    "units of hx": lambda x: (x, torch.zeros(1, 3, 5)),
    "dtype of hx": lambda x: (x, torch.zeros(1, 3, 6, dtype=torch.float64)),
    "dimensions of hx": lambda x: (x, torch.zeros(3, 6)),
    "pair of hx": lambda x: (x, (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6))),
    "list as hx": lambda x: (x, [torch.zeros(1, 3, 6)]),
    "number as hx": lambda x: (x, 5),
    "numbers as hx": lambda x: (x, (0.0, 0.0)),
    "iterator as hx": lambda x: (x, iter([torch.zeros(1, 3, 6)] * 2)),
    "nested, strided": lambda x: (torch.nested.nested_tensor([x[:, 0], x[:2, 1]]), None),
    "freed hx": lambda x: (x, freed(torch.zeros(1, 3, 6))),
    "freed": lambda x: (freed(x), None),
    "freed, every other feature": lambda x: (freed_view(x.repeat(1, 1, 2), lambda more: more[..., ::2]), None),
}


def freed_view(tensor: torch.Tensor, view_of) -> torch.Tensor:
    view = view_of(tensor)
    freed(tensor)
    return view


@pytest.mark.parametrize("gradients", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_errors_are_the_long_ways(cell, name, gradients, monkeypatch):
    layer, x, found = layer_of(cell), torch.randn(5, 3, 4), []
    for short in (True, False):
        if not short:
            monkeypatch.setattr(plain_calls, "run", lambda *_, **__: None)
        with torch.set_grad_enabled(gradients):
            found.append(outcome(layer, *WRONG[name](x.clone())))
    assert_same(*found)
    assert isinstance(found[0][0], type) or (cell, name) == ("lstm", "pair of hx")


CHANGES = {
    "a backend": lambda layer: setattr(layer, "backend", "torch_eager"),
    "the precision": lambda layer: torch.set_float32_matmul_precision("medium"),
    "the axes": lambda layer: setattr(layer, "batch_first", True),
    "a weight": lambda layer: setattr(layer, "weight_hh_l0", torch.nn.Parameter(torch.randn(18, 6))),
    "weights of another size": lambda layer: setattr(layer, "weight_hh_l0", torch.nn.Parameter(torch.randn(18, 5))),
    "data": lambda layer: layer.weight_hh_l0.data.mul_(2),
    "the dtype": lambda layer: layer.double(),
    "dropout": lambda layer: setattr(layer, "dropout", 0.5),
    "recompute": lambda layer: setattr(layer, "recompute", 1),
    "the number of directions": lambda layer: setattr(layer, "bidirectional", None),
    "options": lambda layer: setattr(layer, "cell_options", sk.CellOptions(zoneout=0.5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_since_the_last_call_counts(name, monkeypatch):
    precision = torch.get_float32_matmul_precision()
    layer, x = layer_of("gru").eval(), torch.randn(5, 3, 4)
    try:
        with torch.no_grad():
            layer(x)
            CHANGES[name](layer)
            short = outcome(layer, x)
            monkeypatch.setattr(plain_calls, "run", lambda *_, **__: None)
            assert_same(short, outcome(layer, x))
    finally:
        torch.set_float32_matmul_precision(precision)


def test_whoever_watches_sees_the_long_way(long_calls, caplog):
    layer, x = layer_of("gru"), torch.randn(5, 3, 4)
    layer(x)
    assert not long_calls
    with caplog.at_level(logging.DEBUG, "seqkernels"):
        layer(x)
    torch.vmap(lambda one: layer(one)[0], in_dims=1)(x.unsqueeze(1))
    layer(x, lengths=[5, 2, 1])
    layer(x, return_all_states=True)
    layer(x.view(5, 12)[:, :4])  # one sequence
    assert len(long_calls) >= 4 and "cpu" in caplog.text


@pytest.mark.parametrize("gradients", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("mode", [Functions, Operations, torch.profiler.profile])
def test_modes_and_profilers_see_the_operator(mode, gradients):
    layer, x = layer_of("gru"), torch.randn(5, 3, 4)
    with torch.set_grad_enabled(gradients):
        unseen = layer(x)
        with mode() as watching:
            seen = layer(x)
    names = watching.seen if mode is not torch.profiler.profile else [event.name for event in watching.events()]
    assert any("seqkernels" in name and "recurrence_forward" in name for name in names)
    assert all(map(torch.equal, unseen, seen))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", [Operations, torch.profiler.profile])
def test_a_checkpoint_may_be_repeated_under_a_mode(mode, batch_first):
    layer, x = layer_of("gru", batch_first=batch_first), torch.randn(5, 3, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    y, _ = checkpoint(layer, x, use_reentrant=False)
    with mode():
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_an_interrupt_is_no_refusal(monkeypatch):
    """A default device is a mode, whose Python runs in the middle of a call."""

    def interrupted(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.is_neg:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))

    layer, x = layer_of("gru"), torch.randn(5, 3, 4)
    monkeypatch.setattr(DeviceContext, "__torch_function__", interrupted)
    with torch.no_grad(), torch.device("cpu"), pytest.raises(KeyboardInterrupt):
        layer(x)


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", AS_THEY_LIE)
def test_inputs_are_taken_as_they_lie(name, batch_first, one_step):
    layer, x = layer_of("lstm", batch_first=batch_first), AS_THEY_LIE[name](torch.randn(5, 3, 4))
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            y, state = layer.step(x[0]) if one_step else layer(x)
            plain = x[0].clone() if one_step else x.clone(memory_format=torch.contiguous_format)
            expected, expected_state = layer.step(plain) if one_step else layer(plain)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        assert all(map(torch.equal, state, expected_state))
        assert y.is_inference() == inference


@pytest.mark.parametrize("gradients", [True, False], ids=["train", "infer"])
def test_a_torch_that_hands_out_no_handles_calls_the_operators(gradients, long_calls, monkeypatch):
    layer, x = layer_of("lstm"), torch.randn(5, 3, 4)
    with torch.set_grad_enabled(gradients):
        expected = outcome(layer, x)
        assert not long_calls
        monkeypatch.setattr(direct, "_library", None)
        assert_same(expected, outcome(layer, x))
        assert bool(long_calls) != gradients


def test_steps_go_the_short_way_too(monkeypatch):
    layer, x = layer_of("gru", num_layers=2), torch.randn(3, 4)
    with torch.no_grad():
        y, state = layer.step(x, layer.step(x)[1])
        monkeypatch.setattr(plain_calls, "run", lambda *_, **__: None)
        expected, expected_state = layer.step(x, layer.step(x)[1])
    assert torch.equal(y, expected) and torch.equal(state, expected_state)


@pytest.mark.parametrize("batch_first", [False, True])
def test_outputs_may_be_changed_in_place(batch_first):
    layer, x = layer_of("gru", batch_first=batch_first), torch.randn(5, 3, 4, requires_grad=True)
    expected = torch.autograd.grad((layer(x)[0] * 2 + 1).sum(), x)[0]
    y, _ = layer(x)
    y *= 2
    y += 1
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_inputs_that_were_copied_may_be_changed_in_place(batch_first):
    layer, x = layer_of("gru", batch_first=batch_first), torch.randn(3, 5, 4, requires_grad=True)
    x_as_given = (lambda: x.clone()) if batch_first else (lambda: x.clone().transpose(0, 1))
    expected = torch.autograd.grad(layer(x_as_given())[0].sum(), x)[0]
    given = x_as_given()
    y, _ = layer(given)
    given += 1
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_gradients_of_many_at_once(batch_first):
    layer, x = layer_of("lstm", batch_first=batch_first), torch.randn(5, 3, 4, requires_grad=True)
    y, _ = layer(x)
    many = torch.randn(2, *y.shape)
    found = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)[0]
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many])
    torch.testing.assert_close(found, expected)


def test_a_graph_of_fx_may_begin_with_the_state_alone():
    class OfState(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer_of("gru")
            self.register_buffer("x", torch.randn(5, 3, 4))

        def forward(self, hx):
            return self.rnn(self.x, hx)[0]

    model, hx = OfState(), torch.randn(1, 3, 6)
    assert torch.equal(torch.fx.symbolic_trace(model)(hx), model(hx))
