"""Zoneout, dropout within the recurrence, layer norm and blocks: against the specification, and as parts of modules."""

import copy
import itertools
import pickle

import pytest
import torch
from cases import CELLS, DTYPES
from operators import NO_CPU_KERNELS
from options import assert_derivatives, recording, specified
from tolerances import assert_as_close_as_torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels as sk
from seqkernels import reference
from seqkernels._ops import ops
from seqkernels.backends import torch_steps
from seqkernels.backends.cells import CELLS as FACTS
from seqkernels.cell_options import draw
from seqkernels.reference import dense

OPTIONS = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "candidate": {"candidate_dropout": 0.4},
    "input": {"input_dropout": 0.4},
    "weight": {"weight_dropout": 0.4},
    "norm": {"layer_norm": True},
    "norm of gates": {"layer_norm": "gates"},
    "blocks": {"blocks": 3},
    "blocks and masks": {"blocks": 2, "input_dropout": 0.3, "weight_dropout": 0.2},
    "all": {"zoneout": 0.2, "recurrent_dropout": 0.3, "input_dropout": 0.3, "weight_dropout": 0.2, "layer_norm": True},
    "all blocks": {"zoneout": 0.2, "recurrent_dropout": 0.3, "layer_norm": "gates", "blocks": 2},
}
LENGTHS = (2, 0, 4)


def options_of(cell: str) -> list[str]:
    return [name for name in OPTIONS if not (name == "candidate" and cell.startswith("rnn"))]


EACH = [(cell, name) for cell in CELLS for name in options_of(cell)]


def layer_of(cell: str, name: str = "all", dtype=torch.float64, **more):
    torch.manual_seed(0)
    more |= {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype} | more
    layer = getattr(sk, FACTS[cell].display_name)(4, 6, **options, **(OPTIONS[name] if name else {}))
    with torch.no_grad():  # so that no scale is a one that could as well be left out
        for norm in layer._norm_names:
            getattr(layer, norm).add_(torch.randn_like(getattr(layer, norm)), alpha=0.3)
    return layer


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def call(layer, layout: str, x, states):
    """x ``[T, B, I]`` in a layout -> (outputs of each sequence, final states)."""
    hx = states if len(states) == 2 else states[0]
    if layout == "packed":
        output, end = layer(pack_padded_sequence(x, LENGTHS_PACKED, enforce_sorted=False), hx)
        output = pad_packed_sequence(output)[0]
    elif layout == "lengths":
        output, end = layer(x, hx, lengths=torch.tensor(LENGTHS))
    else:
        output, end = layer(x, hx)
    return output, as_tuple(end)


LENGTHS_PACKED = (3, 1, 4)
IN_LAYOUT = {"padded": (4,) * 3, "packed": LENGTHS_PACKED, "lengths": LENGTHS}


def results(layer, layout: str, training: bool):
    """Outputs, final states and gradients of everything, ours and as specified."""
    lengths = IN_LAYOUT[layout]
    dtype = layer.weight_ih_l0.dtype
    x = torch.randn(4, 3, 4, dtype=dtype, requires_grad=True)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or 6, 6][: FACTS[layer.mode.lower()].states]
    states = tuple(torch.randn(count, 3, size, dtype=dtype, requires_grad=True) for size in sizes)
    layer.train(training)
    torch.manual_seed(1)
    with recording() as drawn:
        output, end = call(layer, layout, x, states)
    ys = [output[:length, b] for b, length in enumerate(lengths)]
    spec_ys, *spec_end = specified(layer, [x[:length, b] for b, length in enumerate(lengths)], states, drawn, lengths)
    inputs = x, *states, *layer.parameters()
    found = []
    for of in ((*ys, *end), (*spec_ys, *(s for s in spec_end if s is not None))):
        generator = torch.Generator().manual_seed(2)
        loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in of)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        found.append([*of, *gradients])
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", IN_LAYOUT)
@pytest.mark.parametrize(("cell", "name"), EACH)
def test_as_specified(cell, name, layout, training):
    ours, spec = results(layer_of(cell, name), layout, training)
    torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "blocks" not in name])
def test_a_projection_as_specified(name):
    ours, spec = results(layer_of("lstm", name, proj_size=3), "lengths", training=True)
    torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"layer_norm": True}, {"layer_norm": "gates"}], ids=str)
def test_a_projection_to_as_many_features(options):
    """Sizes say nothing of it then: the number of weights does."""
    weights = [torch.randn(shape) for shape in ((24, 3), (24, 6), (24,), (24,), (6, 6))]
    options = sk.CellOptions(**options)
    norms = [torch.rand(size) for size in options.norm_sizes("lstm", 6, True, True).values()]
    call = torch.randn(5, 2, 3), None, weights
    y, states = sk.functional.lstm(*call, cell_options=options, norms=norms)
    expected = sk.functional.lstm(*call, cell_options=options, norms=norms, backend="torch_eager")
    torch.testing.assert_close((y, states), expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_without_bias_as_specified(cell, name):
    ours, spec = results(layer_of(cell, name, bias=False), "padded", training=True)
    torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-9)


def test_states_of_an_lstm_zone_out_apart():
    layer = sk.LSTM(4, 6, zoneout=(0.2, 0.5), dtype=torch.float64)
    for training in (True, False):
        ours, spec = results(layer, "padded", training)
        torch.testing.assert_close(ours, spec, rtol=1e-9, atol=1e-9)
    only_h = sk.LSTM(4, 6, zoneout=(0.999, 0.0))
    torch.manual_seed(0)
    _, (h_n, c_n) = only_h(torch.randn(2, 50, 4))
    assert (h_n == 0).float().mean() > 0.95 and (c_n == 0).sum() == 0


@pytest.mark.parametrize(("cell", "name"), EACH)
def test_masks_repeat_with_the_seed_and_differ_from_call_to_call(cell, name):
    layer, x = layer_of(cell, name), torch.randn(7, 3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], first)
    masked = name not in ("norm", "norm of gates", "blocks")
    assert torch.equal(first, second) != masked
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_masks_of_sequences_hold_for_all_their_steps():
    """With h's whole mask zero in one unit, nothing ever comes from it: gradients of its columns of W_hh are zero."""
    layer = sk.GRU(4, 64, recurrent_dropout=0.5)
    layer(torch.randn(9, 1, 4))[0].sum().backward()
    dead = (layer.weight_hh_l0.grad == 0).all(0).float().mean()
    assert 0.2 < dead < 0.8


def test_probabilities_are_those_that_are_given():
    with recording() as drawn:
        sk.LSTM(4, 300, zoneout=(0.1, 0.3), recurrent_dropout=0.25)(torch.randn(5, 40, 4))
    masks = drawn.masks[0]
    assert abs(masks.zoneout_h.mean() - 0.1) < 0.01 and abs(masks.zoneout_c.mean() - 0.3) < 0.01
    assert abs((masks.recurrent == 0).float().mean() - 0.25) < 0.03 and masks.recurrent.max() == 1 / 0.75


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sequences_of_nothing_keep_their_state(cell, name):
    layer, x = layer_of(cell, name), torch.randn(3, 2, 4, dtype=torch.float64)
    states = [torch.randn(4, 2, 6, dtype=torch.float64) for _ in range(1 + (cell == "lstm"))]
    for none, some in (layer(x[:, :0])[0], torch.empty(3, 0, 12)), (layer(x, lengths=[0, 0])[0], torch.zeros(3, 2, 12)):
        assert none.shape == some.shape and not none.any()
    _, ends = layer(x, states[0] if len(states) == 1 else tuple(states), lengths=[0, 0])
    for end, state in zip(as_tuple(ends), states, strict=True):
        torch.testing.assert_close(end, state, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_of_gradients(cell, name):
    layer = layer_of(cell, name, num_layers=1, bidirectional=False)
    assert_derivatives(layer, torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_other_dtypes(name, dtype):
    layer = layer_of("lstm", name, dtype=dtype)
    x = torch.randn(7, 3, 4, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    output, _ = layer(x)
    torch.manual_seed(1)
    exact, _ = copy.deepcopy(layer).double()(x.double())
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps)
    output.sum().backward()
    assert x.grad.dtype == dtype and all(p.grad.dtype == dtype for p in layer.parameters())


IN_KERNELS = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "candidate": {"candidate_dropout": 0.4},
    "masks": {"zoneout": 0.2, "recurrent_dropout": 0.3, "candidate_dropout": 0.3, "blocks": 2},
    "norm": {"layer_norm": True},
    "norm and masks": {"zoneout": 0.2, "recurrent_dropout": 0.3, "candidate_dropout": 0.3, "layer_norm": "gates"},
}
OF_ONE_CELL = {
    "rnn_tanh": {"zoneout": 0.3},
    "gru": {"layer_norm": True, "blocks": 4},
    "lstm": {"zoneout": 0.2, "recurrent_dropout": 0.3, "candidate_dropout": 0.3, "proj_size": 20},
}


def run_by(backend, cell: str, options: dict, dtype, seed: int, exact=False):
    """Results and gradients of a layer of 40 units on ragged sequences; exact: from the same numbers in float64."""
    torch.manual_seed(seed)
    layer = getattr(sk, FACTS[cell].display_name)(5, 40, bidirectional=True, **options).to(dtype)
    x, lengths = torch.randn(6, 21, 5).to(dtype), (torch.arange(21) + 6).flip(0) % 7
    layer, x = (layer.double(), x.double()) if exact else (layer, x)
    layer.backend = backend
    output, end = layer(x.requires_grad_(), lengths=lengths)
    named = {"x": x} | dict(layer.named_parameters())
    loss = sum((o.double() * torch.randn(o.shape, dtype=torch.float64)).sum() for o in (output, *as_tuple(end)))
    gradients = torch.autograd.grad(loss, list(named.values()))
    return {"output": output, "h_n": as_tuple(end)[0]} | dict(zip(named, gradients, strict=True))


@pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=str(NO_CPU_KERNELS))
@pytest.mark.parametrize(
    ("cell", "name", "dtype"),
    # What a loop of torch's errs by in float64 is the error of the specification itself, which norms enlarge.
    [
        *(
            (cell, name, dtype)
            for cell, name, dtype in itertools.product(("gru", "lstm", "ligru"), IN_KERNELS, DTYPES)
            if not (dtype == torch.float64 and "norm" in name)
        ),
        *((cell, "of one cell", torch.bfloat16) for cell in OF_ONE_CELL),
    ],
)
@pytest.mark.parametrize("instruction_set", ["avx512", "avx2", "baseline"], indirect=True)  # others have the same
def test_kernels_are_as_close_as_torch(cell, name, dtype, instruction_set, monkeypatch):
    """As a loop of torch's operations in that dtype; torch_eager in float64 is as specified (test_as_specified)."""

    def zoned(before, new, stays, at):
        return new if stays is None else new + stays[at].to(new.dtype) * (before - new)

    def step(cell, of_x, of_h, w_hr, h, c, candidate, of_c, step=torch_steps.step):
        return step(cell, of_x, of_h, w_hr, h, c, None if candidate is None else candidate.to(h.dtype), of_c)

    monkeypatch.setattr(torch_steps, "to_acc", lambda *tensors: list(tensors))
    monkeypatch.setattr(torch_steps, "step", step)
    monkeypatch.setattr(torch_steps, "_times", lambda h, mask, at: h if mask is None else h * mask[at].to(h.dtype))
    monkeypatch.setattr(torch_steps, "_zoned", zoned)
    torch.set_num_threads(2)
    kinked = cell == "ligru" and dtype.itemsize == 2  # as in specification.judged
    contenders = ("cpu", False), ("torch_eager", False), ("torch_eager", True)
    options = IN_KERNELS.get(name) or OF_ONE_CELL[cell]
    found: list[list] = [[] for _ in contenders]
    for seed in range(5):  # so many draws, as what a norm of few steps enlarges, it enlarges by chance
        for draws, (backend, exact) in zip(found, contenders, strict=True):
            results = run_by(backend, cell, options, dtype, seed, exact)
            draws.append({key: results[key] for key in results if not kinked or key in ("output", "h_n")})
    assert_as_close_as_torch(*found, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_gives_its_dtype(name):
    layer, x = layer_of("gru", name, torch.float32), torch.randn(7, 3, 4)
    torch.manual_seed(1)
    exact = layer(x)[0]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = layer(x)
    assert output.dtype == h_n.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05)
    output.sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_recompute_gives_the_same_bits(name, training):
    found = []
    for recompute in (False, True):
        layer = layer_of("lstm", name, recompute=recompute).train(training)
        torch.manual_seed(1)
        x = torch.randn(7, 3, 4, dtype=torch.float64, requires_grad=True)
        layer(x)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(("cell", "name"), EACH)
def test_resets_cut_sequences(cell, name):
    layer = layer_of(cell, name, bidirectional=False).eval()
    x, mask = torch.randn(6, 1, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 0, 1, 0], dtype=torch.bool)
    pieces = [layer(piece)[0] for piece in (x[:2], x[2:4], x[4:])]
    torch.testing.assert_close(layer(x, reset=mask.unsqueeze(1))[0], torch.cat(pieces))


@pytest.mark.parametrize(("cell", "name"), EACH)
def test_steps_equal_the_sequence(cell, name):
    layer = layer_of(cell, name, bidirectional=False).eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    state, ys = None, []
    for x_t in x:
        y, state = layer.step(x_t, state)
        ys.append(y)
    output, end = layer(x)
    torch.testing.assert_close(torch.stack(ys), output)
    torch.testing.assert_close(as_tuple(state), as_tuple(end))


@pytest.mark.parametrize("cell, name", [("rnn_tanh", "zoneout"), ("gru", "all"), ("lstm", "all blocks")])
def test_gradients_of_an_empty_batch_are_zeros(cell, name):
    layer = layer_of(cell, name)
    x = torch.randn(3, 0, 4, dtype=torch.float64, requires_grad=True)
    output, end = layer(x)
    assert output.requires_grad and all(state.requires_grad for state in as_tuple(end))
    grads = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    assert not any(grad.count_nonzero() for grad in grads)


def test_steps_in_training():
    sk.GRU(4, 6, zoneout=0.5).step(torch.randn(3, 4))
    for name in ("recurrent", "candidate", "input", "weight"):
        layer = layer_of("gru", name, bidirectional=False)
        with pytest.raises(ValueError, match="one mask for all steps of a sequence"):
            layer.step(torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_blocks_are_a_block_diagonal_matrix(cell, blocks, backend, dtype):
    ours, plain = layer_of(cell, None, dtype, blocks=blocks), layer_of(cell, None, dtype)
    weights = {
        name: dense(w, blocks).to(w) if "hh" in name and w.dim() == 2 else w for name, w in ours.state_dict().items()
    }
    plain.load_state_dict(weights)
    ours.backend = plain.backend = backend
    x = torch.randn(4, 3, 4, dtype=dtype)
    torch.testing.assert_close(call(ours, "packed", x, states_of(ours)), call(plain, "packed", x, states_of(plain)))


def states_of(layer):
    torch.manual_seed(3)
    sizes = [layer.proj_size or 6, 6][: FACTS[layer.mode.lower()].states]
    return tuple(torch.randn(4, 3, size, dtype=layer.weight_ih_l0.dtype) for size in sizes)


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


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_and_grad(name):
    layer, x = layer_of("lstm", name), torch.randn(3, 5, 2, 4, dtype=torch.float64)
    layer.eval()
    torch.testing.assert_close(torch.vmap(lambda x: layer(x)[0])(x), torch.stack([layer(one)[0] for one in x]))
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
