"""recompute=True: the same bits as without, with nothing saved of a layer but what goes into it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import seqkernels as sk

LAYERS = {
    "RNN": {"nonlinearity": "relu", "num_layers": 2},
    "GRU": {"num_layers": 3, "bidirectional": True, "dropout": 0.5},
    "LSTM": {"num_layers": 2, "bidirectional": True, "bias": False},
    "LSTM projected": {"num_layers": 2, "proj_size": 3, "dropout": 0.3},
    "LiGRU": {"num_layers": 2},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [6, 2, 0, 4]
LAYOUTS = ["padded", "unbatched", "packed", "lengths", "cu_seqlens"]


def twins(name: str, **options):
    """A layer without and one with recompute, of the same weights."""
    for recompute in (False, True):
        torch.manual_seed(0)
        yield getattr(sk, name.split()[0])(4, 6, recompute=recompute, **{**LAYERS[name], **options})


def call(layer, layout: str, x: torch.Tensor, hx=None):
    """A call on x ``[T, B, I]``, or a part of it, with the random numbers of a seed."""
    torch.manual_seed(1)
    if layout == "unbatched":
        return layer(x[:, 0])
    if layout == "packed":
        some = [length for length in LENGTHS if length]
        return layer(pack_padded_sequence(x[:, : len(some)], some, enforce_sorted=False))
    if layout == "lengths":
        return layer(x, hx, lengths=torch.tensor(LENGTHS))
    if layout == "cu_seqlens":
        rows, ends = x.flatten(0, 1), torch.tensor([0, *LENGTHS]).cumsum(0)
        names = ("bias", "num_layers", "dropout", "training", "bidirectional", "recompute", "backend")
        options = {name: getattr(layer, name) for name in names}
        function = getattr(sk.functional, type(layer).__name__.lower())
        if isinstance(layer, sk.RNN):
            options["nonlinearity"] = layer.nonlinearity
        return function(rows[: ends[-1]], hx, layer._flat_weights, cu_seqlens=ends, **options)
    return layer(x, hx)


def leaves(outputs) -> list[torch.Tensor]:
    outputs = [o.data if isinstance(o, PackedSequence) else o for o in outputs]
    return [o for o in tree_leaves(outputs) if isinstance(o, torch.Tensor)]


def results(layer, run=call, layout: str = "padded", dtype=torch.float32, **options) -> list[torch.Tensor]:
    """Outputs, and the gradients of the input and of all parameters."""
    x = torch.randn(6, 4, 4, generator=torch.Generator("cpu").manual_seed(2), device="cpu")
    x = x.to(layer.weight_ih_l0.device, dtype).requires_grad_()
    outputs = leaves(run(layer, layout, x))
    loss = sum((k + 1) * output.float().square().sum() for k, output in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [x, *layer.parameters()], **options)]


def assert_same_bits(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == right.dtype and torch.equal(ours, right)


def saved_bytes(run, *parameters: torch.Tensor) -> int:
    """What a call saves for its backward pass, but for parameters; each memory once."""
    kept: dict[int, list[torch.Tensor]] = {}
    known = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        memory = tensor.untyped_storage().data_ptr()
        if memory not in known:
            kept.setdefault(memory, []).append(tensor.detach())  # held, so that no other memory gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(max(tensor.nbytes for tensor in tensors) for tensors in kept.values())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_are_the_same(name, layout, dtype):
    plain, recomputed = (results(layer, layout=layout, dtype=dtype) for layer in twins(name, dtype=dtype))
    assert_same_bits(recomputed, plain)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_the_bits_are_the_same_where_kernels_take_whole_tiles(name, dtype):
    plain, recomputed = (getattr(sk, name)(64, 160, num_layers=2, dtype=dtype, recompute=r) for r in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    x, found = torch.randn(5, 40, 64, dtype=dtype), []
    for layer in (plain, recomputed):
        output, _ = layer(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_are_the_same_on_every_backend(name, layout, backend):
    found = []
    for layer in twins(name):
        layer.backend = backend
        found.append(results(layer, layout=layout))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_saved_but_what_goes_into_layers(name, layout):
    """The input, which is h of the layer below, and the initial states."""
    found = []
    for layer in twins(name, dropout=0.0):
        x = torch.randn(6, 4, 4)
        found.append(saved_bytes(lambda layer=layer, x=x: call(layer, layout, x), *layer.parameters()))
    rows = {"padded": 24, "unbatched": 6, "packed": 12, "lengths": 24, "cu_seqlens": 12}[layout]
    sequences = {"unbatched": 1, "packed": 3}.get(layout, 4)
    directions = 2 if layer.bidirectional else 1
    features = [layer.proj_size or 6, 6][: 2 if isinstance(layer, sk.LSTM) else 1]
    inputs = rows * (4 + (layer.num_layers - 1) * directions * features[0])
    states = layer.num_layers * directions * sequences * sum(features)
    # Beside them the order of sequences and rows in int64, by which gradients of what was packed here are put in place.
    order = {"packed": 6, "lengths": 6 + 4, "cu_seqlens": 6 + 4 + 2 * rows}.get(layout, 0)
    assert found[1] <= 4 * (inputs + states) + 8 * order < found[0]


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_less_memory_is_held_until_the_backward_pass(name):
    """Of a stack of one width h is kept, which is a fifth of what a GRU and a sixth of what an LSTM keeps without."""
    layers = twins(name, num_layers=4, bidirectional=False, dropout=0.0)
    bytes_of = [saved_bytes(lambda layer=layer: layer(torch.randn(50, 8, 4)), *layer.parameters()) for layer in layers]
    assert bytes_of[1] < bytes_of[0] / 4


class Operators(TorchDispatchMode):
    """The operators of ours that run, with the number of their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqkernels":
            self.names.append(function._overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_layers_run_again_one_at_a_time_and_only_for_gradients():
    _, layer = twins("LSTM")
    layer(torch.randn(6, 4, 4))
    with Operators() as forward:
        output, _ = layer(torch.randn(6, 4, 4))
    with Operators() as backward:
        output.sum().backward()
    assert forward.names == ["recurrence_forward"] * 2
    assert backward.names == ["recurrence_recompute"] * 2
    with Operators() as forward, torch.no_grad():
        layer(torch.randn(6, 4, 4))
    assert forward.names == ["recurrence_forward"]


def test_frozen_layers_have_no_gradients():
    found = []
    for layer in twins("GRU"):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("l0" not in name)
        torch.manual_seed(1)
        layer(torch.ones(6, 4, 4))[0].sum().backward()
        found.append([parameter.grad for parameter in layer.parameters()])
    for ours, expected in zip(*reversed(found), strict=True):
        assert (ours is None and expected is None) or torch.equal(ours, expected)


def test_dropout_leaves_the_generator_where_it_does_without():
    states = []
    for layer in twins("GRU"):
        torch.manual_seed(1)
        layer(torch.randn(6, 4, 4))[0].sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("name", LAYERS)
def test_it_gives_what_checkpoint_gives(name):
    plain, recomputed = twins(name)

    def checkpointed(layer, layout, x):
        torch.manual_seed(1)
        return checkpoint(layer, x, use_reentrant=False)

    assert_same_bits(results(recomputed), results(plain, checkpointed))


def test_under_autocast():
    def cast(layer, layout, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return call(layer, layout, x)

    plain, recomputed = (results(layer, cast) for layer in twins("GRU"))
    assert plain[0].dtype == torch.bfloat16
    assert_same_bits(recomputed, plain)


@pytest.mark.parametrize("name", LAYERS)
def test_double_backward(name):
    """As without: by torch's operations. With several layers it adds up in another order, each being a node."""
    for layers in (1, LAYERS[name]["num_layers"]):
        found = []
        for layer in twins(name, dtype=torch.float64, num_layers=layers, dropout=0.0):
            first = results(layer, dtype=torch.float64, create_graph=True)
            loss = sum(grad.square().sum() for grad in first)
            found.append(torch.autograd.grad(loss, list(layer.parameters())))
        torch.testing.assert_close(found[1], found[0])
        if layers == 1:
            assert_same_bits(found[1], found[0])


def test_a_graph_that_is_kept_gives_the_same_again():
    _, layer = twins("LiGRU")
    loss = layer(torch.randn(6, 4, 4))[0].square().sum()
    first = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, list(layer.parameters())), first)


def test_an_output_may_be_changed_in_place():
    def changing(layer, layout, x):
        output, state = call(layer, layout, x)
        return output.mul_(2), state

    plain, recomputed = (results(layer, changing) for layer in twins("LSTM"))
    assert_same_bits(recomputed, plain)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler):
    def compiled(layer, layout, x):
        run = torch.compile(layer, fullgraph=True, backend=compiler)
        torch.manual_seed(1)
        return run(x)

    plain, recomputed = (results(layer, compiled) for layer in twins("GRU", dropout=0.0))
    assert_same_bits(recomputed, plain)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_compiled_code_saves_as_little(name):
    found = []
    for layer in twins(name, dropout=0.0):
        run = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        x = torch.randn(50, 8, 4)
        found.append(saved_bytes(lambda run=run, x=x: run(x), *layer.parameters()))
    assert found[1] < 0.6 * found[0]


def test_masks_of_compiled_dropout_repeat():
    _, layer = twins("GRU")
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 4, 4, requires_grad=True)
    torch.manual_seed(1)
    output, _ = run(x)
    torch.manual_seed(1)
    expected, _ = layer(x)
    assert_same_bits(
        [output, *torch.autograd.grad(output.sum(), [x, *layer.parameters()])],
        [expected, *torch.autograd.grad(expected.sum(), [x, *layer.parameters()])],
    )


@pytest.mark.parametrize("name", ["GRU", "LSTM projected"])
def test_with_all_states_and_learned_ones(name):
    options = {"return_all_states": True, "learn_initial_state": True}
    plain, recomputed = (results(layer) for layer in twins(name, **options))
    assert_same_bits(recomputed, plain)
    bytes_of = [
        saved_bytes(lambda layer=layer: layer(torch.randn(50, 8, 4)), *layer.parameters())
        for layer in twins(name, dropout=0.0, return_all_states=True)
    ]
    assert bytes_of[1] < bytes_of[0] / 2


def test_steps_of_a_stream_have_gradients():
    found = []
    for layer in twins("LSTM", bidirectional=False):
        state, x = None, torch.ones(5, 3, 4, requires_grad=True)
        for step in x:
            y, state = layer.step(step, state)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert_same_bits(found[1], found[0])


def test_functional_call_and_transforms():
    plain, recomputed = twins("GRU", dropout=0.0, dtype=torch.float64)
    given = {name: torch.randn_like(p).requires_grad_() for name, p in plain.named_parameters()}
    x, grads = torch.randn(6, 4, 4, dtype=torch.float64), []
    for layer in (plain, recomputed):
        output, _ = torch.func.functional_call(layer, given, (x,))
        grads.append(torch.autograd.grad(output.square().sum(), list(given.values())))

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,))[0].square().sum()

        detached = {name: p.detach() for name, p in given.items()}
        torch.testing.assert_close(list(torch.func.grad(loss)(detached, x).values()), list(grads[-1]))
        samples = torch.vmap(lambda one, layer=layer: layer(one)[0])(torch.stack([x, 2 * x]))
        torch.testing.assert_close(samples[1], layer(2 * x)[0])
        rows = torch.autograd.grad(samples.square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(sum(layer(k * x)[0].square().sum() for k in (1, 2)), list(layer.parameters()))
        torch.testing.assert_close(rows, expected)
    assert_same_bits(grads[1], grads[0])


def test_batched_gradients():
    _, layer = twins("RNN")
    output, _ = layer(torch.randn(6, 4, 4))
    batch, parameters = torch.randn(3, *output.shape), list(layer.parameters())
    found = torch.autograd.grad(output, parameters, batch, is_grads_batched=True, retain_graph=True)
    for k, one in enumerate(batch):
        expected = torch.autograd.grad(output, parameters, one, retain_graph=True)
        torch.testing.assert_close([grads[k] for grads in found], list(expected))


def test_the_state_is_that_of_torch():
    plain, recomputed = twins("LSTM projected")
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    nn.LSTM(4, 6, num_layers=2, proj_size=3).load_state_dict(recomputed.state_dict())
    assert "recompute=True" in repr(recomputed) and "recompute" not in repr(plain)
    for twin in (copy.deepcopy(recomputed), pickle.loads(pickle.dumps(recomputed))):
        assert twin.recompute


def test_a_layer_that_is_swapped_in_may_be_told_to():
    model = nn.Sequential(nn.GRU(4, 6))
    sk.swap_in(model)
    expected = results(model[0])
    model[0].recompute = True
    assert_same_bits(results(model[0]), expected)
    assert sk.swap_out(model).swapped and type(model[0]) is nn.GRU  # which computes the same, and saves it all
    torch.testing.assert_close(results(model[0]), expected)


@pytest.mark.parametrize("wrong", [1, "yes", None, 0.5])
def test_what_is_no_bool_is_refused(wrong):
    layer, x = sk.GRU(4, 6), torch.randn(6, 4, 4)
    with pytest.raises(TypeError, match=f"recompute is True or False, got {wrong!r}"):
        sk.GRU(4, 6, recompute=wrong)
    with pytest.raises(TypeError, match="recompute is True or False"):
        sk.functional.gru(x, None, layer._flat_weights, recompute=wrong)
    layer.recompute = wrong
    for call_of_it in (layer, layer.step, lambda x: layer(x, return_all_states=True)):
        with pytest.raises(TypeError, match="recompute is True or False"):
            call_of_it(x if call_of_it != layer.step else x[0])


def test_flops_are_those_of_one_more_forward_pass():
    counts = []
    for layer in twins("LSTM"):
        with FlopCounterMode(display=False) as forward:
            output, _ = layer(torch.randn(6, 4, 4, requires_grad=True))
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    (forward, backward), recomputed = counts
    assert recomputed == (forward, forward + backward)
