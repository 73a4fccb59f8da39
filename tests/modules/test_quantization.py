"""quantize_: the kernels beside the specification (quantized_spec.py), on every instruction set; and its use."""

import copy
import io
import itertools

import pytest
import quantized_spec
import torch
from operators import NO_CPU_KERNELS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels as sk
from seqkernels import hardware
from seqkernels.quantized import SMALLEST, pack, quantize_rows, unpack

pytestmark = [
    pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=NO_CPU_KERNELS or "-"),
    pytest.mark.skipif(torch.empty(0).device.type != "cpu", reason="quantized layers are for CPUs"),
]
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # float32's sigmoid and tanh beside those of float64
KINDS = {
    "rnn_tanh": lambda *args, **kwargs: sk.RNN(*args, **kwargs),
    "rnn_relu": lambda *args, **kwargs: sk.RNN(*args, nonlinearity="relu", **kwargs),
    "gru": sk.GRU,
    "lstm": sk.LSTM,
    "ligru": sk.LiGRU,
}


def layer_of(cell: str, *args, **kwargs):
    torch.manual_seed(0)
    layer = KINDS[cell](*args, **kwargs)
    sk.quantize_(layer)
    return layer


def state_of(layer, sequences: int):
    directions, P = layer.num_layers * (2 if layer.bidirectional else 1), layer.proj_size or layer.hidden_size
    h = torch.randn(directions, sequences, P) / 2
    return (h, torch.randn(directions, sequences, layer.hidden_size)) if layer.cell == "lstm" else h


def tensors_of(result) -> list[torch.Tensor]:
    y, state = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


# ---- numbers


@pytest.mark.parametrize("sizes", [(1, 1), (4, 3), (70, 100), (64, 128)], ids=str)
@pytest.mark.parametrize("cell", KINDS)
def test_each_step_is_that_of_the_specification(instruction_set, cell, sizes):
    """Teacher forcing: each step from the state that the kernels left, as a last bit may flip a rounding."""
    layer = layer_of(cell, *sizes)
    x, state = torch.randn(7, 5, sizes[0]), state_of(layer, 5)
    for x_t in x:
        h, c = (s[0] for s in state) if cell == "lstm" else (state[0], None)
        y, state = layer.step(x_t, state)
        h, c = quantized_spec.step(cell, x_t, h, c, layer.state_dict(), "_l0")
        torch.testing.assert_close(y, h.float(), **CLOSE)
        if cell == "lstm":
            torch.testing.assert_close(state[1][0], c.float(), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"proj_size": 20}], ids=str)
def test_lstm_options_are_those_of_the_specification(instruction_set, options):
    layer = layer_of("lstm", 40, 50, **options)
    x, (h, c) = torch.randn(3, 40), state_of(layer, 3)
    y, (_, c_n) = layer.step(x, (h, c))
    expected, c_expected = quantized_spec.step("lstm", x, h[0], c[0], layer.state_dict(), "_l0")
    torch.testing.assert_close(y, expected.float(), **CLOSE)
    torch.testing.assert_close(c_n[0], c_expected.float(), **CLOSE)


@pytest.mark.parametrize("proj_size", [0, 24])
@pytest.mark.parametrize("sequences", [1, 3, 16, 33, 70])
def test_a_sequence_in_one_call_has_the_bits_of_its_steps(instruction_set, sequences, proj_size):
    layer = layer_of("lstm", 33, 72, num_layers=2, proj_size=proj_size)
    x, state = torch.randn(9, sequences, 33), state_of(layer, sequences)
    whole, steps, now = layer(x, state), [], state
    for x_t in x:
        y, now = layer.step(x_t, now)
        steps.append(y)
    assert same_bits(whole, (torch.stack(steps), now))


@pytest.mark.parametrize(("cell", "options"), [*((cell, {}) for cell in KINDS), ("lstm", {"proj_size": 20})], ids=str)
def test_all_states_have_the_bits_of_steps(instruction_set, cell, options):
    layer = layer_of(cell, 20, 40, num_layers=2, return_all_states=True, **options)
    x, now, steps = torch.randn(7, 3, 20), state_of(layer, 3), []
    *whole, states = layer(x, now)
    assert same_bits(whole, layer(x, now, return_all_states=False))
    for x_t in x:
        steps.append(tensors_of(layer.step(x_t, now)))
        now = tuple(steps[-1][1:]) if cell == "lstm" else steps[-1][1]
    states = states if cell == "lstm" else (states,)
    for found, expected in zip(states, list(zip(*steps, strict=True))[1:], strict=True):
        assert torch.equal(found, torch.stack(expected, 1))


def test_all_states_of_ragged_sequences_in_both_directions():
    layer = layer_of("lstm", 20, 40, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(6, 3, 20), [4, 0, 6]
    output, ends, states = layer(x, lengths=lengths, return_all_states=True)
    packed = pack_padded_sequence(x[:, ::2], lengths[::2], enforce_sorted=False)
    of_rows = layer(packed, return_all_states=True)
    assert torch.equal(states[0][1], output) and torch.equal(of_rows[2][0][1], of_rows[0].data)
    for state, rows, end in zip(states, of_rows[2], ends, strict=True):
        alone = torch.stack([pad_packed_sequence(of_rows[0]._replace(data=one))[0] for one in rows])
        assert torch.equal(state[:, :, ::2], alone) and not state[:, :, 1].any()
        forward, backward = end.view(2, 2, 3, 40).unbind(1)
        for b, length in enumerate(lengths):
            if length:
                assert torch.equal(state[:, length - 1, b, :40], forward[:, b])
                assert torch.equal(state[:, 0, b, 40:], backward[:, b])


@pytest.mark.parametrize("cell", KINDS)
def test_a_sequence_has_the_same_bits_in_any_batch(instruction_set, cell):
    layer = layer_of(cell, 20, 60, bidirectional=True)
    x, state = torch.randn(6, 67, 20), state_of(layer, 67)
    y = layer(x, state)[0]
    for first, last in ((0, 1), (3, 12), (40, 67)):
        part = tuple(s[:, first:last] for s in state) if cell == "lstm" else state[:, first:last]
        assert torch.equal(layer(x[:, first:last], part)[0], y[:, first:last])


@pytest.mark.parametrize("sequences", [1, 2, 40])
def test_results_do_not_depend_on_threads_nor_instruction_sets(instruction_set, sequences):
    """Sums of integers are exact; what is float32 differs by rounding, which may flip that of a state."""
    from seqkernels import _C

    layer = layer_of("gru", 256, 256, bidirectional=True)
    x = torch.randn(20, sequences, 256)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(layer(x))
    torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
    _C.force_isa("baseline")
    torch.testing.assert_close(layer(x)[0], results[0][0], rtol=0, atol=2e-3)


def test_quantized_is_close_to_float32():
    for cell, make in KINDS.items():
        torch.manual_seed(1)
        layer = make(64, 96, num_layers=2, bidirectional=True)
        x = torch.randn(30, 8, 64)
        with torch.no_grad():
            expected = layer(x)[0]
        sk.quantize_(layer)
        error = (layer(x)[0] - expected).abs().mean() / expected.abs().mean()
        assert error < 0.02, (cell, error)


# ---- layouts


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm", "ligru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_ragged_sequences_are_each_alone(instruction_set, cell, bidirectional):
    layer = layer_of(cell, 12, 30, num_layers=2, bidirectional=bidirectional)
    lengths = torch.tensor([4, 9, 1, 7, 0, 9, 2])
    x = torch.randn(9, 7, 12)
    y, state = layer(x, lengths=lengths)
    h = state[0] if cell == "lstm" else state
    for b, length in enumerate(lengths.tolist()):
        assert not y[length:, b].any()
        if length:
            alone, state_alone = layer(x[:length, b : b + 1])
            assert torch.equal(alone[:, 0], y[:length, b])
            assert torch.equal((state_alone[0] if cell == "lstm" else state_alone)[:, 0], h[:, b])


def test_packed_batch_first_and_unbatched():
    layer, first = layer_of("gru", 12, 30), layer_of("gru", 12, 30, batch_first=True)
    x, lengths = torch.randn(9, 4, 12), torch.tensor([9, 3, 5, 1])
    expected, h_n = layer(x, lengths=lengths)
    packed, h_packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert torch.equal(pad_packed_sequence(packed)[0], expected) and torch.equal(h_packed, h_n)
    y, h_first = first(x.transpose(0, 1), lengths=lengths)
    assert torch.equal(y.transpose(0, 1), expected) and torch.equal(h_first, h_n)
    y, h = layer(x[:, 0])
    assert torch.equal(y, expected[:, 0]) and torch.equal(h, h_n[:, 0])
    rows = [x[:length, b] for b, length in enumerate(lengths.tolist())]
    y, h = first(torch.nested.nested_tensor(rows, layout=torch.jagged))
    assert torch.equal(h, h_n)
    for b, one in enumerate(y.unbind()):
        assert torch.equal(one, expected[: lengths[b], b])


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_vmap_is_a_call_for_each_member(cell):
    layer, x = layer_of(cell, 12, 30), torch.randn(3, 5, 2, 12)
    for i, one in enumerate(torch.vmap(lambda x: layer(x)[0])(x)):
        assert torch.equal(one, layer(x[i])[0])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_cut_sequences_into_pieces(cell, bidirectional):
    layer = layer_of(cell, 12, 30, num_layers=2, bidirectional=bidirectional)
    x, mask, lengths = torch.randn(8, 3, 12), torch.zeros(8, 3, dtype=torch.bool), [8, 5, 6]
    mask[[0, 3, 4, 2, 7], [0, 0, 0, 1, 1]] = True  # the first step, neighbours, one behind the end
    state, begun = state_of(layer, 3), state_of(layer, 3)
    y, ends = layer(x, state, lengths=lengths, reset=mask, reset_to=begun)
    for b, length in enumerate(lengths):
        marks = [t for t in range(length) if mask[t, b]]
        for first, end in itertools.pairwise(sorted({0, *marks, length})):
            given = begun if mask[first, b] else state
            of_piece = tuple(s[:, b : b + 1] for s in given) if cell == "lstm" else given[:, b : b + 1]
            alone, *last = tensors_of(layer(x[first:end, b : b + 1], of_piece))
            assert torch.equal(y[first:end, b], alone[:, 0])
        assert all(torch.equal(e[:, b], one[:, 0]) for e, one in zip(tensors_of((y, ends))[1:], last, strict=True))
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    of_rows = pack_padded_sequence(mask, lengths, enforce_sorted=False)
    assert torch.equal(pad_packed_sequence(layer(packed, state, reset=of_rows, reset_to=begun)[0])[0], y)


def test_nothing_to_compute(instruction_set):
    layer = layer_of("lstm", 5, 6, num_layers=2)
    y, (h, c) = layer(torch.zeros(4, 0, 5))
    assert y.shape == (4, 0, 6) and h.shape == c.shape == (2, 0, 6)
    state = state_of(layer, 3)
    y, ends = layer(torch.zeros(0, 3, 5), state, lengths=torch.tensor([0, 0, 0]))
    assert y.shape == (0, 3, 6) and all(map(torch.equal, ends, state))
    cell = sk.GRUCell(0, 6)
    sk.quantize_(cell)
    assert cell(torch.zeros(2, 0)).shape == (2, 6)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_are_layers_of_one_step(name):
    torch.manual_seed(0)
    cell = getattr(sk, name)(10, 20)
    layer = getattr(sk, name.removesuffix("Cell"))(10, 20)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    sk.quantize_(cell)
    sk.quantize_(layer)
    x = torch.randn(3, 10)
    state = of_layer = None
    for _ in range(2):
        expected, of_layer = layer.step(x, of_layer)
        state = cell(x, state)
        assert torch.equal(state[0] if name == "LSTMCell" else state, expected)
    one = cell(x[0])
    assert (one[0] if name == "LSTMCell" else one).shape == (20,)


# ---- numbers at the ends of their range


def test_rows_of_zeros_tiny_and_huge_numbers(instruction_set):
    layer = layer_of("rnn_relu", 40, 30, bias=False)
    x = torch.randn(6, 40)
    x[0] = 0
    x[1] = x[1].sign() * SMALLEST / 2
    x[2] *= 1e-30
    x[3] *= 1e30
    y, _ = layer.step(x)
    h, _ = quantized_spec.step("rnn_relu", x, torch.zeros(6, 30), None, layer.state_dict(), "_l0")
    assert not y[:2].any()
    for ours, expected in zip(y[2:], h[2:], strict=True):
        torch.testing.assert_close(ours / expected.max(), (expected / expected.max()).float(), **CLOSE)
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_makes_its_sequence_nan_and_no_other(instruction_set, value):
    layer = layer_of("gru", 40, 30)
    x = torch.randn(5, 20, 40)
    expected = layer(x)[0]
    x[2, 7, 39] = value
    y = layer(x)[0]
    assert y[2:, 7].isnan().all()
    others = [b for b in range(20) if b != 7]
    assert torch.equal(y[:, others], expected[:, others]) and torch.equal(y[:2], expected[:2])


def test_largest_numbers_do_not_overflow(instruction_set):
    layer = layer_of("rnn_relu", 3000, 17, bias=False)
    state = layer.state_dict()
    state["weight_ih_l0"].fill_(-127)
    state["weight_ih_l0_scale"].fill_(1 / 127)
    layer.load_state_dict(state)
    y, _ = layer.step(torch.full((2, 3000), -1.0))
    torch.testing.assert_close(y, torch.full((2, 17), 3000.0))


def test_packing_loses_nothing():
    for gates, units, n in ((1, 1, 1), (3, 20, 65), (4, 16, 64), (2, 5, 0)):
        weight = torch.randint(-127, 128, (gates * units, n), dtype=torch.int8)
        scale, bias = torch.rand(gates * units), torch.randn(gates * units)
        found = unpack(pack(weight, scale, bias, gates), gates, units, n)
        assert all(map(torch.equal, found, (weight, scale, bias)))


def test_rows_are_quantized_to_nearest():
    integers, scales = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1, float("inf"), 0, 0]]))
    assert integers.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scales[:2].tolist() == [1, 0] and scales[2].isnan()


# ---- models


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.rnn = sk.LSTM(16, 24, num_layers=2, batch_first=True, dropout=0.5)
        self.again = self.rnn
        self.cell = sk.GRUCell(24, 8)
        self.torchs = nn.GRU(8, 8)
        self.head = nn.Linear(24, 3)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def test_the_report_says_what_became_of_each():
    model = Model().eval()
    layer = model.rnn
    report = sk.quantize_(model, filter_fn=lambda module, name: "cell" not in name)
    assert {swap.name: swap.after for swap in report.swapped} == {"rnn": "seqkernels.QuantizedLSTM"}
    assert {swap.name: swap.reason for swap in report.left} == {
        "cell": "filter_fn does not want it",
        "torchs": "it is torch.nn's: swap_in makes it ours",
    }
    assert model.rnn is layer is model.again
    assert repr(layer) == "QuantizedLSTM(16, 24, num_layers=2, batch_first=True, dropout=0.5)"
    assert repr(sk.quantize_(model)).count("GRUCell") == 2
    assert repr(model.cell) == "QuantizedGRUCell(24, 8)"
    assert {swap.name: swap.reason for swap in sk.quantize_(model)} == {
        "rnn": "it is quantized already",
        "cell": "it is quantized already",
        "torchs": "it is torch.nn's: swap_in makes it ours",
    }
    assert {swap.name: swap.reason for swap in sk.swap_out(model)} == {
        "rnn": "it is quantized",
        "cell": "it is quantized",
        "torchs": "it is none of ours",
    }


def test_what_is_left_has_a_reason():
    class Mine(sk.GRU):
        pass

    parametrized = nn.utils.parametrizations.weight_norm(sk.GRU(3, 4), "weight_hh_l0")
    broken = sk.GRU(3, 4)
    broken.weight_hh_l0.data[0, 0] = float("nan")
    wide = sk.RNN(1 << 16, 2)
    more = sk.GRU(3, 4)
    more.register_buffer("mean", torch.zeros(3))
    cases = {
        "subclass": Mine(3, 4),
        "parametrized": parametrized,
        "not finite": broken,
        "torch.float64": sk.GRU(3, 4, dtype=torch.float64),
        "meta": sk.GRU(3, 4, device="meta"),
        "learn_initial_state": sk.GRU(3, 4, learn_initial_state=True),
        "has no zoneout and no blocks": sk.GRU(3, 4, zoneout=0.1, blocks=2, input_dropout=0.1),
        "has no layer_norm": sk.GRU(3, 4, layer_norm=True),
        "columns": wide,
        "more than its weights: mean": more,
    }
    for word, module in cases.items():
        before = type(module)
        (swap,) = sk.quantize_(module)
        assert swap.after is None and word in swap.reason and type(module) is before
    with pytest.raises(TypeError, match="quantize_ takes a model"):
        sk.quantize_(sk.GRU)


def test_dropouts_are_left_out():
    options = {"recurrent_dropout": 0.2, "candidate_dropout": 0.3, "input_dropout": 0.4, "weight_dropout": 0.5}
    layer, plain = sk.GRU(3, 4, **options), sk.GRU(3, 4)
    plain.load_state_dict(layer.state_dict())
    assert len(sk.quantize_(layer).swapped) == len(sk.quantize_(plain).swapped) == 1
    x = torch.randn(5, 2, 3)
    assert torch.equal(layer(x)[0], plain(x)[0])


def test_weights_take_a_quarter_of_the_memory():
    model = sk.LSTM(512, 512, num_layers=2)
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    sk.quantize_(model)
    assert not list(model.parameters())
    after = sum(b.numel() * b.element_size() for b in model.buffers())
    assert after < 0.26 * before
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 0.27 * before


def test_state_dicts_copies_and_pickles():
    torch.manual_seed(0)
    model = Model().eval()
    floats = copy.deepcopy(model.state_dict())
    sk.quantize_(model)
    tokens = torch.randint(11, (4, 6))
    with torch.no_grad():
        expected = model(tokens)
    state = model.state_dict()
    assert state["rnn.weight_ih_l0"].shape == (96, 16) and state["rnn.weight_ih_l0"].dtype == torch.int8
    assert state["rnn.weight_ih_l0_scale"].shape == (96,) and "rnn.packed_weight_ih_l0" not in state
    other = Model().eval()
    sk.quantize_(other)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for same in (copy.deepcopy(model), torch.load(file, weights_only=False), other, other):
        if same is other:
            same.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(same(tokens), expected)
    other.load_state_dict(floats)  # quantized where it is loaded
    with torch.no_grad():
        assert torch.equal(other(tokens), expected)


def test_state_dicts_that_do_not_fit_say_so():
    layer = layer_of("gru", 4, 5)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_hh_l0_scale"):
        layer.load_state_dict({key: value for key, value in state.items() if key != "weight_hh_l0_scale"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_hh_l1"):
        layer.load_state_dict(state | {"weight_hh_l1": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_ih_l0: \[15, 4\] in the model, \[15, 3\]"):
        layer.load_state_dict(state | {"weight_ih_l0": state["weight_ih_l0"][:, :3]})


def test_wrong_calls_raise_sentences():
    layer = layer_of("gru", 4, 5)
    x = torch.randn(3, 2, 4)
    with pytest.raises(RuntimeError, match=r"QuantizedGRU has no gradients: call it under torch.no_grad\(\)"):
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="QuantizedGRU has no gradients"):
        torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    with torch.no_grad():
        layer(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"QuantizedGRU is for inference: call eval\(\) of the model"):
        layer.train()(x)
    layer.eval()
    with pytest.raises(ValueError, match=r"QuantizedGRU takes float32 and quantizes by itself, got torch.bfloat16"):
        layer(x.bfloat16())
    with pytest.raises(TypeError, match="to be a Tensor or a PackedSequence, got a list"):
        layer([x])
    with pytest.raises(TypeError, match="return_all_states is True or False, got 1"):
        layer(x, return_all_states=1)
    with pytest.raises(TypeError, match="a step takes a Tensor, got a list"):
        layer.step([x[0]])
    with pytest.raises(RuntimeError, match="QuantizedGRU runs on the CPU: its input is on meta"):
        layer(x.to("meta"))
    with pytest.raises(RuntimeError, match="Expected 4, got 3"):
        layer(x[..., :3])
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(x, torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match="no step"):
        layer_of("gru", 4, 5, bidirectional=True).step(x[0])
    assert not layer.bfloat16()(x)[0].isnan().any()  # a model's dtype is not that of what is quantized


def test_defaults_of_new_tensors_are_none_of_its_business():
    layer, x = layer_of("gru", 4, 5), torch.randn(3, 2, 4)
    expected = layer(x)[0]
    with torch.device("meta"):
        assert torch.equal(layer(x)[0], expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(x)[0], expected) and torch.equal(layer.step(x[0])[0], expected[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_and_inference_mode_change_nothing():
    layer, x = layer_of("lstm", 8, 9), torch.randn(3, 2, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(layer(x), expected)
    with torch.inference_mode():
        assert same_bits(layer(x), expected)


# ---- the operator


def arguments_of(cell: str, **options):
    layer = layer_of(cell, 10, 20, **options)
    state = state_of(layer, 3)
    h, c = state if cell == "lstm" else (state, None)
    return [cell, torch.randn(12, 10), list(layer.buffers()), h, c, torch.tensor([3, 3, 3, 2, 1]), layer.num_layers]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 7}], ids=str)
def test_opcheck(options):
    for operator in (torch.ops.seqkernels.quantized_recurrence, torch.ops.seqkernels.quantized_all_states):
        torch.library.opcheck(operator.default, arguments_of("lstm", **options))


def test_the_operator_refuses_what_does_not_fit():
    run, good = torch.ops.seqkernels.quantized_recurrence, arguments_of("gru")

    def refused(sentence: str, place: int, value) -> None:
        with pytest.raises(RuntimeError, match=sentence):
            run(*good[:place], value, *good[place + 1 :])

    _, x, (w_ih, w_hh), h_0, *_ = good
    refused("x is float32", 1, x.double())
    refused("w_ih is", 1, x[:, :0].new_zeros(12, 70))
    refused("w_hh is", 2, [w_ih, w_hh[:1]])
    refused("w_hh has another dtype", 2, [w_ih, w_hh.float()])
    refused("a direction has w_ih, w_hh", 2, [w_ih])
    refused("a direction has w_ih, w_hh", 2, [w_ih, w_hh, w_hh])
    refused("h_0 has", 6, 2)
    refused("c_0 goes with an LSTM", 4, h_0)
    refused("batch_sizes", 5, torch.tensor([9, 3]))


# ---- compilers


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compile_without_breaks(cell):
    layer = layer_of(cell, 10, 20, num_layers=2, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (4, 7):
        x = torch.randn(steps, 3, 10)
        with torch.no_grad():
            assert same_bits(compiled(x), layer(x))


def test_export_with_dynamic_time():
    layer = layer_of("gru", 10, 20)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(layer, (torch.randn(5, 3, 10),), dynamic_shapes=({0: steps},), strict=False)
    x = torch.randn(8, 3, 10)
    assert same_bits(program.module()(x), layer(x))


def test_fx_traces_one_node():
    model = nn.Sequential(layer_of("gru", 10, 20))
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


@torch.no_grad()
def test_explain_says_how_they_multiply():
    model, x = nn.Sequential(sk.LSTM(4, 5), Outputs()), torch.randn(6, 3, 4)
    sk.quantize_(model)
    plan = sk.explain(model[0], x, lengths=[6, 2, 1])
    how = {"amx": "AMX", "avx512_bf16": "AVX512-VNNI", "avx512_vnni": "AVX512-VNNI"}
    isa = hardware.THIS_MACHINE.isa
    assert plan.backend == "cpu" and f"int8 by {how.get(isa, f'pairs of int16 ({isa})')}" in plan.kernel
    assert "not torch_eager: it has no kernel for weights of int8" in str(plan)
    for explanation in (sk.explain(model), sk.explain(model, x)):
        assert [(one.name, one.cls, one.plan) for one in explanation] == [("0", "seqkernels.QuantizedLSTM", plan)]
    cell = nn.Sequential(sk.GRUCell(4, 5))
    sk.quantize_(cell)
    assert sk.explain(cell[0], x[0], torch.zeros(3, 5)) == plan
    with pytest.raises(ValueError, match="QuantizedLSTM takes float32 and quantizes by itself"):
        sk.explain(model[0], x.double())
    with pytest.raises(TypeError, match="return_all_states is True or False, got 'yes'"):
        sk.explain(model[0], x, return_all_states="yes")
    for one in (cell[0], sk.GRUCell(4, 5)):
        with pytest.raises(TypeError, match="a cell takes input and hx, got lengths"):
            sk.explain(one, x[0], lengths=[1, 1, 1])


class Outputs(nn.Module):
    def forward(self, found):
        return found[0]
