"""Options beyond torch.nn: the states of every layer at every step, and initial states that are learned."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqkernels as sk

LAYERS = {
    "RNN": {"nonlinearity": "relu"},
    "GRU": {"num_layers": 2, "bidirectional": True},
    "LSTM": {"num_layers": 3, "bidirectional": True, "bias": False},
    "LSTM projected": {"num_layers": 2, "proj_size": 3},
    "LiGRU": {"num_layers": 2},
}
LENGTHS = [5, 2, 4]


def layer_of(name: str, **options):
    torch.manual_seed(0)
    return getattr(sk, name.split()[0])(4, 6, **LAYERS[name], dtype=torch.float64, **options)


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def inputs_of(layout: str, layer):
    """(input, keyword arguments, lengths) of a call."""
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    user = x.transpose(0, 1) if layer.batch_first else x
    if layout == "unbatched":
        return x[:, 0], {}, [5]
    if layout == "packed":
        return pack_padded_sequence(user, LENGTHS, layer.batch_first, enforce_sorted=False), {}, LENGTHS
    return (
        user,
        {"lengths": torch.tensor(LENGTHS)} if layout == "lengths" else {},
        LENGTHS if layout != "padded" else [5] * 3,
    )


def time_major(states, layout: str, output, layer):
    """All states [L, T, B, *] of any layout."""
    if layout == "packed":
        padded = [pad_packed_sequence(output._replace(data=rows))[0] for rows in states]
        return torch.stack(padded)
    if layout == "unbatched":
        return states.unsqueeze(2)
    return states.transpose(1, 2) if layer.batch_first else states


def by_prefixes(layer, input, lengths):
    """States [L, T, B, D*P] by torch.nn's way: the final states of each layer's run over a part of each sequence."""
    rows = pad_packed_sequence(input)[0] if isinstance(input, PackedSequence) else input
    if rows.dim() == 2:
        rows = rows.unsqueeze(1)
    elif layer.batch_first and not isinstance(input, PackedSequence):
        rows = rows.transpose(0, 1)
    directions = 2 if layer.bidirectional else 1
    each = len(layer._flat_weights) // layer.num_layers
    x, found = rows, []
    for number in range(layer.num_layers):
        weights = layer._flat_weights[number * each : (number + 1) * each]
        of_layer = None
        for b, length in enumerate(lengths):
            for d in range(directions):
                mine = weights[d * each // directions : (d + 1) * each // directions]
                for t in range(length):
                    part = x[: t + 1, b] if d == 0 else x[t:length, b].flip(0)
                    _, end = sk.functional.recurrent(
                        layer.mode.lower(), part, None, mine, bias=layer.bias, backend="torch_eager"
                    )
                    ends = [state[0] for state in as_tuple(end)]
                    if of_layer is None:
                        of_layer = [e.new_zeros(len(x), len(lengths), directions * len(e)) for e in ends]
                    for whole, e in zip(of_layer, ends, strict=True):
                        whole[t, b, d * len(e) : (d + 1) * len(e)] = e
        found.append(of_layer)
        x = of_layer[0]
    return [torch.stack(states) for states in zip(*found, strict=True)]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed", "lengths", "unbatched"])
@pytest.mark.parametrize("name", LAYERS)
def test_all_states_are_those_that_parts_of_the_sequence_end_with(name, layout, batch_first):
    layer = layer_of(name, return_all_states=True, batch_first=batch_first)
    input, options, lengths = inputs_of(layout, layer)
    output, end, states = layer(input, **options)
    expected = by_prefixes(layer, input, lengths)
    found = [time_major(s, layout, output, layer) for s in as_tuple(states)]
    torch.testing.assert_close(found, expected)
    rows = output.data if layout == "packed" else output
    torch.testing.assert_close(as_tuple(states)[0][-1], rows, rtol=0, atol=0)
    layer.return_all_states = False
    torch.testing.assert_close((output, end), layer(input, **options))
    weighing = [torch.randn_like(s) for s in expected]
    losses = [sum((w * s).sum() for w, s in zip(weighing, each, strict=True)) for each in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, list(layer.parameters())) for loss in losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_states_end_with_the_final_ones(dtype):
    layer = sk.LSTM(4, 6, num_layers=2, return_all_states=True, dtype=dtype)
    _, (h_n, c_n), (h, c) = layer(torch.randn(5, 3, 4, dtype=dtype))
    torch.testing.assert_close((h[:, -1], c[:, -1]), (h_n, c_n), rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_all_states_with_dropout_are_those_of_the_same_seed():
    layer, plain = (sk.GRU(4, 6, 3, dropout=0.5, return_all_states=all_states) for all_states in (True, False))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    output, *_ = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(output, plain(x)[0])


def test_a_call_may_say_otherwise_than_the_layer():
    x, layers = torch.randn(5, 3, 4, dtype=torch.float64), [layer_of("GRU", return_all_states=a) for a in (True, False)]
    torch.testing.assert_close(layers[0](x), layers[1](x, return_all_states=True))
    torch.testing.assert_close(layers[1](x), layers[0](x, return_all_states=False))


@pytest.mark.parametrize("option", ["return_all_states", "learn_initial_state"])
def test_options_are_true_or_false(option):
    with pytest.raises(TypeError, match=f"{option} is True or False, got 'False'"):
        layer_of("GRU", **{option: "False"})
    with pytest.raises(TypeError, match="return_all_states is True or False, got 1"):
        layer_of("GRU")(torch.randn(5, 3, 4, dtype=torch.float64), return_all_states=1)


@pytest.mark.parametrize("layout", ["padded", "packed", "lengths", "unbatched"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_learned_state_is_that_of_every_sequence(name, layout):
    layer, plain = layer_of(name, learn_initial_state=True), layer_of(name)
    assert plain.load_state_dict(layer.state_dict(), strict=False).missing_keys == []
    states = [p for n, p in layer.named_parameters() if n.startswith("initial")]
    for state in states:
        assert not state.any()
        nn.init.normal_(state)
    input, options, lengths = inputs_of(layout, layer)
    hx = [s if layout == "unbatched" else s.unsqueeze(1).expand(-1, len(lengths), -1).contiguous() for s in states]
    given = [h.detach().requires_grad_() for h in hx]
    output, end = layer(input, **options)
    expected, expected_end = plain(input, tuple(given) if len(given) == 2 else given[0], **options)
    torch.testing.assert_close((output, end), (expected, expected_end))
    data, wanted = (y.data if layout == "packed" else y for y in (output, expected))
    grads = torch.autograd.grad(data.square().sum(), states)
    of_given = torch.autograd.grad(wanted.square().sum(), given)
    torch.testing.assert_close(grads, tuple(g if layout == "unbatched" else g.sum(1) for g in of_given))


def test_a_given_state_goes_before_a_learned_one():
    layer, plain = layer_of("GRU", learn_initial_state=True), layer_of("GRU")
    nn.init.normal_(layer.initial_h)
    x, h_0 = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, h_0), plain(x, h_0))


def test_a_stream_begins_with_the_learned_state():
    layer = layer_of("LSTM projected", learn_initial_state=True)
    nn.init.normal_(layer.initial_c)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y, state = layer.step(x[0])
    torch.testing.assert_close(layer.step(x[1], state)[0], layer(x)[0][1])
    torch.testing.assert_close(layer.step(x[0, 0])[0], y[0])


def test_state_dicts_of_torch_load_and_leave_the_learned_state():
    ours = nn.ModuleDict({"rnn": sk.LSTM(4, 6, learn_initial_state=True)})
    nn.init.normal_(ours["rnn"].initial_h)
    before = ours["rnn"].initial_h.clone()
    theirs = nn.ModuleDict({"rnn": nn.LSTM(4, 6)})
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours["rnn"].initial_h, before)
    torch.testing.assert_close(ours["rnn"].weight_hh_l0, theirs["rnn"].weight_hh_l0)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_hh_l0"):
        ours.load_state_dict({"rnn.weight_ih_l0": theirs["rnn"].weight_ih_l0})
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin.state_dict(), ours.state_dict())
        twin.load_state_dict(theirs.state_dict())


def test_the_initial_state_is_reset_to_zeros():
    layer = sk.LiGRU(4, 6, learn_initial_state=True)
    nn.init.normal_(layer.initial_h)
    layer.reset_parameters()
    assert not layer.initial_h.any() and layer.weight_hh_l0.any()
    assert repr(layer).endswith("learn_initial_state=True)")


@pytest.mark.parametrize("option", ["return_all_states", "learn_initial_state"])
def test_swap_out_leaves_what_torch_has_not(option):
    layer = sk.GRU(4, 6, **{option: True})
    report = sk.swap_out(layer)
    assert type(layer) is sk.GRU and f"torch.nn has no {option}" in str(report)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_both_options_compile(compiler):
    layer, x = sk.LSTM(4, 6, return_all_states=True, learn_initial_state=True), torch.randn(5, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x), layer(x))
