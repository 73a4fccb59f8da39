"""torch.func: what a transform gives is what a loop over members gives."""

import pytest
import torch
from operators import NO_CPU_KERNELS
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import seqkernels as sk
from seqkernels import batching, ensembles

LAYERS = {
    "RNN": {"batch_first": True},
    "GRU": {"bias": False},
    "LSTM": {"proj_size": 3},
    "GRU deep": {"num_layers": 2, "bidirectional": True},
    "LiGRU": {},
}
DOUBLE = {"dtype": torch.float64}


def layer_of(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return getattr(sk, name.split()[0])(4, 5, **LAYERS[name], **DOUBLE)


def flat(results) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else [t for one in results for t in flat(one)]


def stacked(members) -> list[torch.Tensor]:
    return [torch.stack(each) for each in zip(*map(flat, members), strict=True)]


def loss(results) -> torch.Tensor:
    return sum(t.square().sum() for t in flat(results))


@pytest.mark.parametrize("dim", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_the_same_layer(name, dim):
    layer, xs = layer_of(name), torch.randn(5, 6, 3, 4, **DOUBLE)
    found, expected = vmap(layer, in_dims=dim)(xs), stacked(layer(x) for x in xs.unbind(dim))
    torch.testing.assert_close(flat(found), expected)
    wanted = list(layer.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss(results), wanted) for results in (found, expected)))
    with torch.no_grad():
        torch.testing.assert_close(flat(vmap(layer, in_dims=dim)(xs)), expected)


def test_inputs_of_the_same_layer_are_one_call(monkeypatch):
    called, layer = [], layer_of("GRU")
    forward = sk.ops.torch_eager.forward
    monkeypatch.setattr(sk.ops.torch_eager, "forward", lambda *args: called.append(args) or forward(*args))
    layer.backend = "torch_eager"
    vmap(layer)(torch.randn(5, 6, 3, 4, **DOUBLE))
    assert [args[1].shape for args in called] == [(5 * 6 * 3, 4)]


def test_one_call_of_many_inputs_rounds_as_planned():
    """Of a launch's numbers the first, whatever the backend, says how products are rounded; others are of sizes."""
    told, layer = [], layer_of("LiGRU")
    members = batching.Members(lambda *args: told.append(args[7]) or sk.ops.torch_eager.forward(*args[:9]), None)
    x, h_0 = torch.randn(5, 6 * 3, 4, **DOUBLE), torch.zeros(5, 1, 3, 5, **DOUBLE)
    args = "ligru", x, list(layer.parameters()), h_0, None, None, False, [2, 7, 7], 1, None
    members.forward(args, (None, 0, [None] * 4, 0, None, None, None, [None] * 3, None, None), 5)
    assert told == [[2]]


def test_inputs_and_states_and_lengths():
    layer, xs, hs = layer_of("GRU deep"), torch.randn(2, 6, 3, 4, **DOUBLE), torch.randn(2, 4, 3, 5, **DOUBLE)
    torch.testing.assert_close(flat(vmap(layer)(xs, hs)), stacked(map(layer, xs, hs)))
    torch.testing.assert_close(flat(vmap(layer, (None, 0))(xs[0], hs)), stacked(layer(xs[0], h) for h in hs))

    def ragged(x):
        return layer(x, lengths=[6, 0, 2])

    torch.testing.assert_close(flat(vmap(ragged)(xs)), stacked(map(ragged, xs)))
    twice = vmap(vmap(layer))(xs.expand(3, *xs.shape))
    torch.testing.assert_close([t[1] for t in flat(twice)], stacked(map(layer, xs)))


@pytest.mark.parametrize("name", ["LSTM", "GRU deep"])
def test_lengths_of_each_member(name):
    layer, xs = layer_of(name), torch.randn(2, 6, 3, 4, **DOUBLE)
    lengths, mask = torch.tensor([[6, 0, 2], [1, 1, 5]], device="cpu"), torch.rand(2, 6, 3) < 0.2

    def ragged(x, lengths):
        return layer(x, lengths=lengths)

    def with_reset(x, lengths, mask):
        return layer(x, lengths=lengths, reset=mask)

    for run, args in ((ragged, (xs, lengths)), (with_reset, (xs, lengths, mask))):
        found, expected = vmap(run)(*args), stacked(map(run, *args))
        torch.testing.assert_close(flat(found), expected)
        wanted = list(layer.parameters())
        torch.testing.assert_close(*(torch.autograd.grad(loss(results), wanted) for results in (found, expected)))
    with pytest.raises(ValueError, match="lengths must lie between 0 and the 6 steps"):
        vmap(ragged)(xs, lengths + 1)
    with pytest.raises(RuntimeError, match="lengths of its own for each member"):
        vmap(grad(lambda x, lengths: loss(ragged(x, lengths))))(xs, lengths)


def test_cu_seqlens_of_each_member():
    layer, xs, ends = layer_of("LSTM"), torch.randn(2, 6, 4, **DOUBLE), torch.tensor([[0, 1, 6], [0, 4, 6]])
    weights = list(layer.parameters())

    def run(x, ends):
        return sk.functional.lstm(x, None, weights, cu_seqlens=ends, max_seqlen=6)

    torch.testing.assert_close(flat(vmap(run)(xs, ends)), stacked(map(run, xs, ends)))
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall, and end at"):
        vmap(run)(xs, ends + torch.tensor([[0], [1]]))


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_and_its_gradients(name):
    layers, x = [layer_of(name, seed) for seed in range(3)], torch.randn(6, 3, 4, **DOUBLE)
    parameters, _ = stack_module_state(layers)
    found = vmap(lambda parameters: functional_call(layers[0], parameters, (x,)))(parameters)
    torch.testing.assert_close(flat(found), stacked(layer(x) for layer in layers))
    grads = torch.autograd.grad(loss(found), list(parameters.values()))
    expected = stacked(torch.autograd.grad(loss(layer(x)), list(layer.parameters())) for layer in layers)
    torch.testing.assert_close(list(grads), expected)


def test_an_ensemble_that_shares_a_state_and_some_weights():
    layers, x, h_0 = (
        [layer_of("GRU", seed) for seed in range(3)],
        torch.randn(6, 3, 4, **DOUBLE),
        torch.randn(1, 3, 5, **DOUBLE),
    )
    parameters, _ = stack_module_state(layers)
    shared = {"weight_ih_l0": layers[0].weight_ih_l0, "weight_hh_l0": parameters["weight_hh_l0"].movedim(0, 2)}
    run = vmap(lambda p, h: functional_call(layers[0], p, (x, h)), ({"weight_ih_l0": None, "weight_hh_l0": 2}, None))
    with torch.no_grad():
        for layer in layers:
            layer.weight_ih_l0.copy_(layers[0].weight_ih_l0)
    found, expected = flat(run(shared, h_0)), stacked(layer(x, h_0) for layer in layers)
    torch.testing.assert_close(found, expected)
    of_each = torch.autograd.grad(loss(expected), [layer.weight_hh_l0 for layer in layers])
    torch.testing.assert_close(torch.autograd.grad(loss(found), parameters["weight_hh_l0"])[0], torch.stack(of_each))


def test_an_error_in_an_ensemble_leaves_torch_as_it_was():
    layers, x = [layer_of("GRU", seed) for seed in range(3)], torch.randn(6, 3, 4, **DOUBLE)
    parameters, _ = stack_module_state(layers)

    def member(parameters):
        with pytest.raises(RuntimeError, match="Expected 4, got 3"):
            functional_call(layers[0], parameters, (x[..., :3],))
        with pytest.raises(TypeError, match="hx must be a Tensor, not a tuple"):
            functional_call(layers[0], parameters, (x, (None, None)))
        return functional_call(layers[0], parameters, (x,))

    torch.testing.assert_close(flat(vmap(member)(parameters)), stacked(layer(x) for layer in layers))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_each_sample(name):
    layer, xs = layer_of(name), torch.randn(3, 6, 4, **DOUBLE)
    parameters = dict(layer.named_parameters())
    found = vmap(grad(lambda parameters, x: loss(functional_call(layer, parameters, (x,)))), (None, 0))(parameters, xs)
    expected = stacked(torch.autograd.grad(loss(layer(x)), list(parameters.values())) for x in xs)
    torch.testing.assert_close(list(found.values()), expected)


def test_cells():
    cell, xs = sk.LSTMCell(4, 5, **DOUBLE), torch.randn(2, 3, 4, **DOUBLE)
    torch.testing.assert_close(flat(vmap(cell)(xs)), stacked(map(cell, xs)))


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_jacobians_and_hessians(name):
    layer, x, v = layer_of(name), torch.randn(3, 2, 4, **DOUBLE), torch.randn(3, 2, 4, **DOUBLE)

    def output(x):
        return layer(x)[0]

    jacobian = torch.autograd.functional.jacobian(output, x)
    torch.testing.assert_close(jacrev(output)(x), jacobian)
    torch.testing.assert_close(jacfwd(output)(x), jacobian)
    torch.testing.assert_close(torch.autograd.functional.jacobian(output, x, vectorize=True), jacobian)
    torch.testing.assert_close(jvp(output, (x,), (v,))[1], torch.tensordot(jacobian, v, 3))

    def scalar(x):
        return loss(layer(x))

    torch.testing.assert_close(hessian(scalar)(x), torch.autograd.functional.hessian(scalar, x))


@pytest.mark.parametrize("name", ["GRU deep", "LSTM"])
def test_batched_gradients(name):
    layer, x = layer_of(name), torch.randn(3, 2, 4, **DOUBLE, requires_grad=True)
    y = layer(x)[0]
    directions = torch.randn(5, *y.shape, **DOUBLE)
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(y, wanted, directions, is_grads_batched=True, retain_graph=True)
    expected = stacked(torch.autograd.grad(y, wanted, one, retain_graph=True) for one in directions)
    torch.testing.assert_close(list(found), expected)


def calls_of(run) -> list[str]:
    """The operators of ours that a function calls."""
    with torch.profiler.profile() as profile:
        run()
    return [event.name for event in profile.events() if event.name.startswith("seqkernels::")]


def ensemble_of(layers):
    parameters, _ = stack_module_state(layers)
    return parameters, vmap(lambda p, *args: functional_call(layers[0], p, args), (0, None))


@pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=NO_CPU_KERNELS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_is_one_call_each_way(name, recompute):
    layers = [layer_of(name, seed) for seed in range(3)]
    for layer in layers:
        layer.recompute = recompute
    (parameters, run), x = ensemble_of(layers), torch.randn(6, 3, 4, **DOUBLE, requires_grad=True)
    found = []
    calls = calls_of(lambda: found.append(run(parameters, x)))
    assert calls == ["seqkernels::recurrence_forward"] * (layers[0].num_layers if recompute else 1)
    backward = "seqkernels::recurrence_" + ("recompute" if recompute else "backward")
    assert backward in calls_of(lambda: loss(found[0]).backward())
    expected = torch.autograd.grad(sum(loss(layer(x)) for layer in layers), [x, *layers[1].parameters()])
    torch.testing.assert_close([x.grad, *(p.grad[1] for p in parameters.values())], list(expected))
    with torch.no_grad():
        assert all(
            torch.equal(ours[2], own) for ours, own in zip(flat(run(parameters, x)), flat(layers[2](x)), strict=True)
        )


def test_a_deep_ensemble_that_wants_gradients_goes_on_before_it_is_prepared(monkeypatch):
    layers = [layer_of("GRU deep", seed) for seed in range(2)]
    (parameters, run), x = ensemble_of(layers), torch.randn(6, 3, 4, **DOUBLE)
    monkeypatch.setattr(ensembles, "prepare", None)
    assert run(parameters, x)[0].requires_grad


def test_gradients_of_gradients_of_an_ensemble():
    layers = [layer_of("GRU deep", seed) for seed in range(2)]
    (parameters, run), x = ensemble_of(layers), torch.randn(6, 3, 4, **DOUBLE, requires_grad=True)
    found = []
    for results in (run(parameters, x), stacked(layer(x) for layer in layers)):
        (gradient,) = torch.autograd.grad(loss(results), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_outputs_of_an_ensemble_changed_in_place():
    layers = [layer_of("GRU", seed) for seed in range(2)]
    (parameters, _), x = ensemble_of(layers), torch.randn(6, 3, 4, **DOUBLE)

    def changed(p):
        y, _ = functional_call(layers[0], p, (x,))
        return y.mul_(2)

    found = torch.autograd.grad(vmap(changed)(parameters).sum(), list(parameters.values()))
    expected = stacked(torch.autograd.grad(2 * layer(x)[0].sum(), list(layer.parameters())) for layer in layers)
    torch.testing.assert_close(list(found), expected)


def test_ensembles_of_ensembles_under_autocast_and_compiled():
    layers = [sk.GRU(4, 5) for _ in range(2)]
    (parameters, run), x = ensemble_of(layers), torch.randn(6, 3, 4)
    twice = vmap(run, (None, 0))(parameters, torch.stack([x, 2 * x, 3 * x]))
    torch.testing.assert_close(
        flat(twice),
        [torch.stack(each) for each in zip(*(flat(run(parameters, k * x)) for k in (1, 2, 3)), strict=True)],
    )
    both = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    nested = vmap(run, (0, None))(both, x)
    doubled = run({name: 2 * p for name, p in parameters.items()}, x)
    torch.testing.assert_close([t[1] for t in flat(nested)], flat(doubled))
    with torch.autocast("cpu", torch.bfloat16):
        low = run(parameters, x)
        assert all(torch.equal(ours[1], own) for ours, own in zip(flat(low), flat(layers[1](x)), strict=True))
    compiled = torch.compile(lambda p, x: run(p, x)[0], backend="aot_eager", fullgraph=True)
    wanted = list(parameters.values())
    found, expected = compiled(parameters, x), run(parameters, x)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in (found, expected)))


@pytest.mark.parametrize("options", [{}, {"zoneout": 0.1}])
def test_compiled_transforms(options):
    layer, x = sk.LSTM(4, 5, **options).eval(), torch.randn(2, 2, 4)

    def scalar(x):
        return loss(layer(x))

    runs = vmap(grad(scalar)), grad(scalar), lambda x: jvp(scalar, (x,), (x,))[1]
    for run, argument in zip(runs, (torch.stack([x, 2 * x]), x, x), strict=True):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(argument), run(argument))


def test_compiled_transforms_of_a_ragged_batch():
    layer, x, lengths = sk.GRU(4, 5), torch.randn(3, 2, 4), torch.tensor([3, 1])

    def members(xs):
        return vmap(lambda x: layer(x, lengths=lengths)[0])(xs)

    torch.testing.assert_close(torch.compile(members, backend="eager", fullgraph=True)(x[None]), members(x[None]))
    gradient = torch.compile(grad(lambda x: layer(x, lengths=lengths)[0].sum()), backend="eager")
    with pytest.raises(Exception, match="does not know the steps of a batch with lengths"):
        gradient(x)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_functionalize(name):
    layer, x = getattr(sk, name)(4, 5, num_layers=2, bidirectional=True), torch.randn(6, 3, 4)

    def shifted(x):
        y, _ = layer(x)
        y += 1
        return y

    torch.testing.assert_close(torch.func.functionalize(shifted)(x), layer(x)[0] + 1)


def test_functionalize_of_ragged_batches():
    layer, x = sk.GRU(4, 5, num_layers=2, bidirectional=True), torch.randn(6, 3, 4)
    lengths = torch.tensor([6, 4, 1], device="cpu")

    def packed(x):
        return layer(nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data

    def with_lengths(x):
        return layer(x, lengths=lengths)[0]

    def with_reset(x):
        return layer(x, lengths=lengths, reset=(x > 0)[..., 0])[0]

    for run in (packed, with_lengths, with_reset):
        torch.testing.assert_close(torch.func.functionalize(run)(x), run(x))
    for run in (with_lengths, with_reset):  # torch packs without a gradient there
        gradient = grad(lambda x, run=run: run(x).square().sum())
        torch.testing.assert_close(torch.func.functionalize(gradient)(x), gradient(x))


@pytest.mark.parametrize("make", [sk.RNN, sk.LSTM])
def test_gradients_of_no_members(make):
    layer = make(4, 5, num_layers=2)
    x = torch.randn(0, 6, 3, 4)
    assert vmap(grad(lambda x: layer(x)[0].sum()))(x).shape == x.shape


@pytest.mark.parametrize("backend", ["torch_eager", None])
def test_an_ensemble_without_members(backend):
    layer = sk.GRU(4, 5)
    layer.backend = backend
    parameters = {name: p.detach().expand(0, *p.shape).requires_grad_() for name, p in layer.named_parameters()}
    x = torch.randn(0, 6, 3, 4, requires_grad=True)
    y, h_n = vmap(lambda p, x: functional_call(layer, p, (x,)))(parameters, x)
    assert y.shape == (0, 6, 3, 5) and h_n.shape == (0, 1, 3, 5)
    grads = torch.autograd.grad(y.sum(), [x, *parameters.values()])
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in parameters.values())]
    mask, lengths = torch.zeros(0, 6, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.long)
    assert vmap(lambda x, mask: layer(x, reset=mask)[0])(x, mask).shape == y.shape
    assert vmap(lambda x, lengths: layer(x, lengths=lengths)[0])(x, lengths).shape == y.shape
    ends, weights = torch.zeros(0, 4, dtype=torch.long), list(layer.parameters())
    run = vmap(lambda x, ends: sk.functional.gru(x, None, weights, cu_seqlens=ends, max_seqlen=6)[0])
    assert run(x.flatten(1, 2), ends).shape == (0, 18, 5)
