"""Zoneout, dropout within the recurrence, layer norm and blocks as parts of modules: compiled, transformed, copied; all
states; and what is refused."""

import copy
import itertools
import pickle

import pytest
import torch
from operators import NO_CPU_KERNELS
from options import EACH, LENGTHS, OPTIONS, as_tuple, layer_of, recording, specified, states_of
from torch import nn

import seqkernels as sk
from seqkernels import reference
from seqkernels._ops import ops
from seqkernels.cell_options import draw


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_code_gives_the_same(name):
    torch._dynamo.reset()
    layer, x = layer_of("lstm", name), torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    lengths = torch.tensor([2, 5, 0])  # compiled, their masks have more rows, and so are others
    for training in (True, False):
        layer.train(training)
        found = []
        for run in (layer, compiled):
            torch.manual_seed(1)
            output, (_, c_n) = run(x, lengths=None if training else lengths)
            inputs = x, *layer.parameters()
            grads = torch.autograd.grad(output.square().sum() + c_n.sum(), inputs)
            found.append((output, c_n, *grads))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", OPTIONS)
def test_operators_keep_what_torch_asks_of_them(name):
    """opcheck: schema, fake kernel, autograd formula."""
    options = OPTIONS[name]
    layer = layer_of("lstm", name, num_layers=1)
    if not layer.cell_options.of_step(True):
        pytest.skip("plain operators run it")
    x = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    states = torch.randn(2, 2, 3, 6, dtype=torch.float64)
    masks = draw(layer.cell_options, True, x, *states)
    if name in ("zoneout", "recurrent", "candidate") and not NO_CPU_KERNELS:
        args = "lstm", x, layer._flat_weights, *states, None, *masks[1:], True, [0]
        torch.library.opcheck(ops.masked_forward.cpu, args)
        if name == "zoneout":  # with which an RNN saves more than without
            weights = layer_of("rnn_tanh", name, num_layers=1)._flat_weights
            args = "rnn_tanh", x, weights, states[0], None, None, *masks[1:4], None, True, [0]
            torch.library.opcheck(ops.masked_forward.cpu, args)
    args = "lstm", x, layer._flat_weights, list(layer._norms()), *states, None, *masks[1:]
    kind = str(options["layer_norm"]) if "layer_norm" in options else ""
    torch.library.opcheck(ops.options_forward.torch_eager, (*args, kind, layer.cell_options.blocks))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_and_grad(name, recompute):
    layer, x = layer_of("lstm", name, recompute=recompute), torch.randn(3, 5, 2, 4, dtype=torch.float64)
    layer.eval()
    together, each = torch.vmap(lambda x: layer(x)[0])(x), torch.stack([layer(one)[0] for one in x])
    torch.testing.assert_close(together, each)
    grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (together, each)]
    torch.testing.assert_close(*grads)
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for name_, of_samples in found.items():
        loss(weights, x[1]).backward()
        torch.testing.assert_close(of_samples[1], weights[name_].grad)
        layer.zero_grad()


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("norm", "norm of gates", "blocks")])
def test_randomness_of_vmap(name):
    layer, x = layer_of("gru", name), torch.randn(5, 2, 4, dtype=torch.float64).expand(3, -1, -1, -1)

    def run(x):
        return layer(x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(run)(x)
    same, different = torch.vmap(run, randomness="same")(x), torch.vmap(run, randomness="different")(x)
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])


# ---- modules


def test_plain_state_dicts_load():
    for name in ("zoneout", "norm", "norm of gates", "all"):
        layer = layer_of("lstm", name, learn_initial_state=True)
        plain = nn.LSTM(4, 6, num_layers=2, bidirectional=True, dtype=torch.float64)
        scales = {name: getattr(layer, name).clone() for name in layer._norm_names}
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer.weight_hh_l1, plain.weight_hh_l1)
        assert all(torch.equal(getattr(layer, name), scale) for name, scale in scales.items())
    assert sk.GRU(4, 6, zoneout=0.1, input_dropout=0.2).state_dict().keys() == nn.GRU(4, 6).state_dict().keys()


def test_parameters_of_norms():
    names = set(sk.LSTM(4, 6, layer_norm=True).state_dict()) - set(nn.LSTM(4, 6).state_dict())
    assert names == {"scale_ih_l0", "scale_hh_l0", "scale_c_l0", "shift_c_l0"}
    layer = sk.GRU(4, 6, layer_norm="gates", bidirectional=True)
    assert set(layer.state_dict()) - set(nn.GRU(4, 6, bidirectional=True).state_dict()) == {
        "scale_l0",
        "scale_l0_reverse",
    }
    assert layer.scale_l0.shape == (18,) and bool((layer.scale_l0 == 1).all())
    assert sk.LSTM(4, 6, blocks=3).weight_hh_l0.shape == (24, 2)


@pytest.mark.parametrize(("cell", "name"), EACH)
def test_copies_and_pickles_keep_them(cell, name):
    layer, x = layer_of(cell, name).eval(), torch.randn(5, 3, 4, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.cell_options == layer.cell_options and torch.equal(other(x)[0], layer(x)[0])
    other = layer_of(cell, name)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x)[0], layer(x)[0])


def test_repr_says_them():
    layer = sk.LSTM(4, 6, zoneout=(0.1, 0.2), layer_norm="gates", blocks=2)
    assert repr(layer) == "LSTM(4, 6, zoneout=(0.1, 0.2), layer_norm='gates', blocks=2)"
    assert sk.GRU(4, 6, zoneout=0.0).cell_options is None


def test_options_may_change():
    layer, x = sk.GRU(4, 6), torch.randn(5, 3, 4)
    plain = layer(x)[0]
    layer.cell_options = sk.CellOptions(zoneout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(layer(x)[0], plain)
    layer.cell_options = None
    assert torch.equal(layer(x)[0], plain)
    layer.cell_options = sk.CellOptions(layer_norm=True)
    with pytest.raises(ValueError, match="layer_norm=True has 2 norms"):
        layer(x)
    layer = sk.GRU(4, 6, blocks=2)
    layer.cell_options = None
    with pytest.raises(RuntimeError, match=r"w_hh is \[18, 6\], got \[18, 3\]; that of blocks"):
        layer(x)


def test_swap_out_refuses_with_the_reason():
    model = nn.Sequential(sk.LSTM(4, 6, zoneout=0.1, layer_norm=True))
    (left,) = sk.swap_out(model)
    assert left.after is None and left.reason == "torch.nn has no zoneout and no layer_norm"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_ao_quantizes_no_such_layer():
    with pytest.raises(ValueError, match=r"torch\.ao quantizes no such LSTM: torch\.nn has no zoneout"):
        torch.ao.quantization.quantize_dynamic(nn.Sequential(sk.LSTM(4, 6, zoneout=0.1)), {sk.LSTM})


def test_explain_says_which_way_runs():
    x = torch.randn(7, 3, 4)
    plain = sk.explain(sk.LSTM(4, 6), x)
    assert sk.explain(sk.LSTM(4, 6, recurrent_dropout=0.1, zoneout=0.1), x).backend == plain.backend
    masks = {"zoneout": 0.1, "recurrent_dropout": 0.1, "candidate_dropout": 0.1}
    for options in (masks, {"layer_norm": True}, {"layer_norm": "gates", **masks}):
        assert sk.explain(sk.LSTM(4, 6, **options), x).backend == plain.backend
    assert sk.explain(sk.RNN(4, 6, layer_norm=True, zoneout=0.1), x).backend == plain.backend
    of_blocks, projected = sk.GRU(4, 6, layer_norm=True, blocks=2), sk.LSTM(4, 6, zoneout=0.1, proj_size=3)
    for layer in (sk.RNN(4, 6, zoneout=0.1), of_blocks, projected):
        assert sk.explain(layer, x).backend == plain.backend
    layer = sk.LSTM(4, 6, candidate_dropout=0.1, layer_norm=True, proj_size=3)
    plan = sk.explain(layer, x)
    assert plan.backend == "torch_eager"
    options = "candidate_dropout, layer_norm, proj_size"
    assert plan.kernel == f"{options}: a step at a time in plain torch operations"
    assert NO_CPU_KERNELS or dict(plan.refusals)["cpu"] == f"it has no kernel with {options}"
    assert f"{options}: a step" in str(sk.explain(layer))
    assert sk.explain(sk.LSTM(4, 6, candidate_dropout=0.1).eval(), x) == plain
    assert "side by side 2 blocks of units" in sk.explain(sk.GRU(4, 6, blocks=2), x).kernel
    of_step = sk.GRU(4, 6, blocks=2, recurrent_dropout=0.5)
    assert "one after another 2 blocks of units" in sk.explain(of_step, x).kernel
    assert sk.explain(sk.GRU(4, 6, weight_dropout=0.2), x) == sk.explain(sk.GRU(4, 6), x)


def test_functions_take_them():
    layer, x = layer_of("lstm", "all", num_layers=1).eval(), torch.randn(9, 4, dtype=torch.float64)
    weights, norms = layer._flat_weights, layer._norms()
    found, _ = sk.functional.lstm(
        x, None, weights, bidirectional=True, cu_seqlens=torch.tensor([0, 2, 9]), cell_options=layer.cell_options,
        norms=norms,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.cat([layer(x[:2])[0], layer(x[2:])[0]]))


# ---- what is refused


@pytest.mark.parametrize(
    "name", ["recurrent_dropout", "candidate_dropout", "input_dropout", "weight_dropout", "zoneout"]
)
def test_probabilities_are_in_range(name):
    for value in (1, 1.0, -0.1, float("nan"), 2):
        with pytest.raises(ValueError, match=rf"{name} is a probability in \[0, 1\)"):
            sk.GRU(4, 6, **{name: value})
    for value in ("0.1", None, True):
        with pytest.raises(TypeError, match=f"{name} is a probability"):
            sk.GRU(4, 6, **{name: value})


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: sk.GRU(4, 6, zoneout=(0.1, 0.2)), ValueError, "two states; GRU has one"),
        (lambda: sk.LSTM(4, 6, zoneout=(0.1, 0.2, 0.3)), ValueError, "that of h and that of c, got 3"),
        (lambda: sk.LSTM(4, 6, zoneout=(0.1, 1.0)), ValueError, "zoneout is a probability in"),
        (lambda: sk.RNN(4, 6, candidate_dropout=0.1), ValueError, "candidate_dropout is for gated cells"),
        (lambda: sk.GRU(4, 6, layer_norm="products"), ValueError, "layer_norm is True, False or 'gates'"),
        (lambda: sk.GRU(4, 6, layer_norm=1), ValueError, "layer_norm is True, False or 'gates'"),
        (lambda: sk.GRU(4, 6, blocks=4), ValueError, "6 units are no 4 equal blocks"),
        (lambda: sk.GRU(4, 6, blocks=0), ValueError, "blocks is at least 1"),
        (lambda: sk.GRU(4, 6, blocks=2.0), TypeError, "blocks is a number of blocks"),
        (lambda: sk.LSTM(4, 6, blocks=2, proj_size=2), ValueError, "blocks go with no proj_size"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("cell", "name"), [(cell, name) for cell, name in EACH if cell in ("gru", "lstm", "ligru")])
def test_all_states_are_those_of_the_same_call(cell, name, recompute):
    layer, found = layer_of(cell, name, dropout=0.2, recompute=recompute), []
    x, hx = torch.randn(5, 3, 4, dtype=torch.float64), states_of(layer)
    for all_states in (False, True):
        torch.manual_seed(1)
        y, end, *states = layer(x, hx if cell == "lstm" else hx[0], lengths=LENGTHS, return_all_states=all_states)
        loss = y.square().sum() + sum(state.sum() for state in as_tuple(end))
        found.append((y, *as_tuple(end), *torch.autograd.grad(loss, list(layer.parameters()))))
    torch.testing.assert_close(*found)
    states = as_tuple(*states)
    assert torch.equal(states[0][1], y) and all(state.shape == (2, *y.shape) for state in states)
    for all_of_layers, state_n in zip(states, as_tuple(end), strict=True):
        for b, length in enumerate(LENGTHS):
            for of_layer, ends in zip(all_of_layers, state_n.unflatten(0, (2, 2)), strict=True):
                forward, backward = of_layer[:, b].chunk(2, 1)
                if length:
                    torch.testing.assert_close(ends[:, b], torch.stack([forward[length - 1], backward[0]]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OPTIONS), ("all", {"proj_size": 3})])
def test_all_states_of_an_lstm_as_specified(name, options, training, monkeypatch):
    layer, steps = layer_of("lstm", name, **options).train(training), []
    x = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    hx = states_of(layer)
    with recording() as drawn:
        states = layer(x, hx, lengths=torch.tensor(LENGTHS), return_all_states=True)[2]

    def step(*args, step=reference.step):
        steps.append(step(*args))
        return steps[-1]

    monkeypatch.setattr(reference, "step", step)
    specified(layer, [x[:length, b] for b, length in enumerate(LENGTHS)], hx, drawn, LENGTHS)
    expected, each = [state.new_zeros(state.shape) for state in states], iter(steps)
    for number, d, (b, length) in itertools.product(range(2), range(2), enumerate(LENGTHS)):
        for t in reversed(range(length)) if d else range(length):
            for of_all, state in zip(expected, next(each), strict=True):
                of_all[number, t, b, d * len(state) : (d + 1) * len(state)] = state
    torch.testing.assert_close(list(states), expected)
    weights = [torch.randn_like(state) for state in expected]
    losses = [sum((w * s).sum() for w, s in zip(weights, of, strict=True)) for of in (states, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, [x, *layer.parameters()]) for loss in losses))


def test_all_states_compile_with_options():
    layer = layer_of("lstm", num_layers=1, bidirectional=False, return_all_states=True)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        found = []
        for run in (layer, compiled):
            torch.manual_seed(1)
            found.append(run(x))
        torch.testing.assert_close(*found)


def test_calls_that_do_not_fit_are_refused():
    x = torch.randn(5, 3, 4)
    layer = sk.GRU(4, 6, layer_norm=True)
    layer.backend = "cudnn"
    with pytest.raises(ValueError, match=r"no backend runs gru.*cudnn: "):
        layer(x)
    weights = list(sk.GRU(4, 6).parameters())
    with pytest.raises(TypeError, match=r"cell_options are seqkernels\.CellOptions, got dict"):
        sk.functional.gru(x, None, weights, cell_options={"zoneout": 0.1})
    with pytest.raises(RuntimeError, match=r"of 2 blocks w_hh is \[18, 3\], got \[18, 6\]"):
        sk.functional.gru(x, None, weights, cell_options=sk.CellOptions(blocks=2))
    with pytest.raises(RuntimeError, match=r"scale_hh is \[18\], got \[6\]"):
        sk.functional.gru(
            x, None, weights, cell_options=sk.CellOptions(layer_norm=True), norms=[torch.ones(18), torch.ones(6)]
        )
    with pytest.raises(ValueError, match="norms are the parameters of layer_norm"):
        sk.functional.gru(x, None, weights, norms=[torch.ones(18)])
