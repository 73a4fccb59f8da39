"""Zoneout, dropout within the recurrence, layer norm and blocks, against the specification, by every way there is."""

import copy
import itertools

import pytest
import torch
from cases import CELLS, DTYPES
from operators import NO_CPU_KERNELS
from options import (
    EACH,
    LENGTHS,
    OPTIONS,
    as_tuple,
    assert_derivatives,
    layer_of,
    recording,
    specified,
    states_of,
)
from tolerances import assert_typically_as_close_as_torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels as sk
from seqkernels.backends import torch_steps
from seqkernels.backends.cells import CELLS as FACTS
from seqkernels.reference import dense


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
    assert_typically_as_close_as_torch(*found, dtype)


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
