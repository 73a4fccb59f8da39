"""Resets inside of sequences: marked steps begin anew, in every layout, as if the sequences had been cut there."""

import itertools

import pytest
import torch
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels as sk
from seqkernels import late_checks, pieces, reference, resets

LAYERS = {
    "RNN": {"nonlinearity": "relu", "bidirectional": True},
    "GRU": {"num_layers": 2, "bidirectional": True},
    "LSTM": {"num_layers": 2, "bias": False},
    "LSTM projected": {"proj_size": 3, "bidirectional": True},
    "LiGRU": {"num_layers": 2},
}
LAYOUTS = ("padded", "batch first", "unbatched", "packed", "packed unsorted", "lengths", "cu_seqlens", "nested")
DOUBLE = {"dtype": torch.float64}
STEPS, LENGTHS = 6, (4, 6, 0, 1)
MARKS = {
    "none": lambda mask: mask.zero_(),
    "some": lambda mask: mask,
    "first steps": lambda mask: mask.zero_().index_fill_(0, torch.tensor(0), True),
    "every step": lambda mask: mask.fill_(True),
}


def layer_of(name: str, **options):
    torch.manual_seed(0)
    return getattr(sk, name.split()[0])(4, 5, **{**LAYERS[name], **DOUBLE, **options})


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def as_state(layer, states):
    return states if states is None or layer.mode == "LSTM" else states[0]


def random_states(layer, sequences: int) -> tuple[torch.Tensor, ...]:
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    return tuple(torch.randn(rows, sequences, size, **DOUBLE, requires_grad=True) for size in sizes)


def lengths_in(layout: str) -> tuple[int, ...]:
    if layout == "unbatched":
        return (STEPS,)
    if layout.startswith("packed"):  # which has no empty sequences
        return (6, 4, 4, 1) if layout == "packed" else (4, 6, 1, 4)
    return LENGTHS if layout in ("lengths", "cu_seqlens", "nested") else (STEPS,) * 4


def call(layer, layout: str, x, mask, hx=None, reset_to=None):
    """Outputs ``[T_b, *]`` and final states of a call on x ``[T, B, I]`` with mask ``[T, B]``, in any layout."""
    lengths, options = lengths_in(layout), {}
    if layout == "unbatched":
        x, mask = x[:, 0], mask[:, 0]
        hx, reset_to = (s and tuple(state[:, 0] for state in s) for s in (hx, reset_to))
    elif layout.startswith("packed"):
        x, mask = (pack_padded_sequence(t, lengths, enforce_sorted=layout == "packed") for t in (x, mask))
    elif layout == "lengths":
        options["lengths"] = torch.tensor(lengths)
    elif layout == "batch first":
        layer.batch_first, x, mask = True, x.transpose(0, 1), mask.t()
    elif layout in ("cu_seqlens", "nested"):
        x, mask = (torch.cat([t[:length, b] for b, length in enumerate(lengths)]) for t in (x, mask))
        offsets = torch.tensor((0, *lengths)).cumsum(0)
        if layout == "nested":
            x, mask = (torch.nested.nested_tensor_from_jagged(t, offsets) for t in (x, mask))
    states = {"hx": as_state(layer, hx), "reset": mask, "reset_to": as_state(layer, reset_to)}
    if layout == "cu_seqlens":
        output, end = functional(layer, x, cu_seqlens=offsets, **states)
        return output.split(lengths), as_tuple(end)
    output, end = layer(x, **states, **options)
    if layout == "nested":
        return output.unbind(), as_tuple(end)
    if layout == "unbatched":
        return [output], tuple(state.unsqueeze(1) for state in as_tuple(end))
    if layout.startswith("packed"):
        output = pad_packed_sequence(output)[0]
    elif layout == "batch first":
        output = output.transpose(0, 1)
    return [output[:length, b] for b, length in enumerate(lengths)], as_tuple(end)


def functional(layer, input, *, hx, **options):
    names = ["num_layers", "bias", "bidirectional"]
    if layer.mode.startswith("RNN"):
        names.append("nonlinearity")
    name = layer.mode.partition("_")[0].lower()
    options |= {option: getattr(layer, option) for option in names}
    return getattr(sk.functional, name)(input, hx, layer._flat_weights, **options)


def by_pieces(layer, lengths, x, mask, hx=None, reset_to=None):
    """The same by the specification, which runs each piece of a sequence alone."""
    pieces, begins, last, zeros = [], [], [], [state.detach() * 0 for state in random_states(layer, len(lengths))]
    for b, length in enumerate(lengths):
        cuts = [0, *(t for t in range(1, length) if mask[t, b]), length]
        for start, stop in itertools.pairwise(cuts):
            anew = start < stop and bool(mask[start, b])
            pieces.append(x[start:stop, b])
            begins.append([state[:, b] for state in ((reset_to if anew else hx) or zeros)])
        last.append(len(pieces) - 1)
    h_0, *c_0 = (torch.stack(states, 1) for states in zip(*begins, strict=True))
    options = {"bias": layer.bias, "num_layers": layer.num_layers, "bidirectional": layer.bidirectional}
    weights = layer._flat_weights
    outputs, *ends = reference.forward(layer.mode.lower(), pieces, h_0, c_0[0] if c_0 else None, weights, **options)
    joined = [torch.cat(outputs[begin + 1 : end + 1]) for begin, end in zip([-1, *last], last, strict=False)]
    return joined, tuple(state[:, last] for state in ends if state is not None)


def loss(outputs, ends) -> torch.Tensor:
    """One number of which every result has another part."""
    torch.manual_seed(2)
    return sum((torch.randn_like(t) * t).sum() for t in (*outputs, *ends))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_those_of_the_pieces_alone(name, layout):
    layer, lengths = layer_of(name), lengths_in(layout)
    torch.manual_seed(1)
    x = torch.randn(STEPS, len(lengths), 4, **DOUBLE, requires_grad=True)
    hx, reset_to = (random_states(layer, len(lengths)) for _ in range(2))
    for marks in MARKS.values():
        mask = marks(torch.rand(STEPS, len(lengths)) < 0.3)
        others = [(hx, None), (hx, hx), (None, reset_to)] if marks is MARKS["some"] else []
        for states in [(None, None), (hx, reset_to), *others]:
            ours = call(layer, layout, x, mask, *states)
            expected = by_pieces(layer, lengths, x, mask, *states)
            torch.testing.assert_close(tuple(map(tuple, ours)), tuple(map(tuple, expected)))
            wanted = [x, *layer.parameters(), *(t for state in states for t in state or ())]
            found = (torch.autograd.grad(loss(*r), wanted, materialize_grads=True) for r in (ours, expected))
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_state_before_a_marked_step_is_zero_or_the_given_one(name):
    """The definition as a loop over steps, with torch.nn's own cells."""
    layer, cell = (getattr(n, c)(4, 5, **DOUBLE) for n, c in ((sk, name), (torch.nn, f"{name}Cell")))
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x, mask = torch.randn(STEPS, 3, 4, **DOUBLE), torch.rand(STEPS, 3) < 0.4
    hx = random_states(layer, 3)
    for reset_to in (None, hx):
        state, outputs = [s[0] for s in hx], []
        for x_t, marked in zip(x, mask, strict=True):
            anew = [s[0] for s in reset_to] if reset_to else [torch.zeros_like(s) for s in state]
            state = [torch.where(marked.unsqueeze(1), *pair) for pair in zip(anew, state, strict=True)]
            state = as_tuple(cell(x_t, as_state(layer, state)))
            outputs.append(state[0])
        output, end = layer(x, as_state(layer, hx), reset=mask, reset_to=as_state(layer, reset_to))
        torch.testing.assert_close((output, *as_tuple(end)), (torch.stack(outputs), *(s[None] for s in state)))


def test_every_backend_runs_them(backend):
    layer = sk.GRU(4, 5, num_layers=2).requires_grad_()
    x, mask, h_0 = torch.randn(STEPS, 3, 4, requires_grad=True), torch.rand(STEPS, 3) < 0.3, torch.randn(2, 3, 5)
    found = []
    for layer.backend in (backend, "torch_eager"):
        output, h_n = layer(x, h_0, reset=mask)
        found.append((output, h_n, *torch.autograd.grad(loss([output], [h_n]), [x, *layer.parameters()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", ["packed unsorted", "lengths", "nested"])
def test_the_rows_of_a_mask_do_for_it(layout):
    layer, lengths = layer_of("GRU"), lengths_in(layout)
    x, mask = torch.randn(STEPS, len(lengths), 4, **DOUBLE), torch.rand(STEPS, len(lengths)) < 0.3
    if layout == "lengths":  # what is marked behind the end is not read
        given = {"lengths": torch.tensor(lengths)}
        behind = torch.arange(STEPS).unsqueeze(1) >= given["lengths"]
        torch.testing.assert_close(layer(x, reset=mask | behind, **given), layer(x, reset=mask & ~behind, **given))
    elif layout == "nested":
        x = torch.nested.nested_tensor([x[:n, b] for b, n in enumerate(lengths)], layout=torch.jagged)
        rows = torch.cat([mask[:n, b] for b, n in enumerate(lengths)])
        nested = torch.nested.nested_tensor(list(rows.split(lengths)), layout=torch.jagged)
        (y, end), (expected, of_expected) = layer(x, reset=rows), layer(x, reset=nested)
        torch.testing.assert_close((y.values(), end), (expected.values(), of_expected))
    else:
        x, packed = (pack_padded_sequence(t, lengths, enforce_sorted=False) for t in (x, mask))
        (y, end), (expected, of_expected) = layer(x, reset=packed.data), layer(x, reset=packed)
        torch.testing.assert_close((y.data, end), (expected.data, of_expected))


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4)], ids=["no steps", "no sequences"])
def test_nothing_to_do_is_done(shape):
    layer, x = layer_of("GRU"), torch.randn(shape, **DOUBLE, requires_grad=True)
    mask, hx = torch.ones(shape[:2], dtype=torch.bool), torch.randn(4, shape[1], 5, **DOUBLE)
    output, h_n = layer(x, hx, reset=mask, lengths=torch.zeros(shape[1], dtype=torch.long))
    assert output.shape == (*shape[:2], 10)
    torch.testing.assert_close(h_n, hx)
    output.sum().backward()
    if shape[0]:
        assert layer(x, hx, reset=mask)[0].shape == (*shape[:2], 10)
    else:
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
            layer(x, reset=mask)


def test_learned_states_are_begun_with_anew():
    layer = layer_of("LSTM", learn_initial_state=True)
    torch.nn.init.normal_(layer.initial_h)
    x, mask = torch.randn(STEPS, 3, 4, **DOUBLE), torch.rand(STEPS, 3) < 0.4
    learned = tuple(s.unsqueeze(1).expand(-1, 3, -1).contiguous() for s in (layer.initial_h, layer.initial_c))
    expected = layer(x, learned, reset=mask, reset_to=learned)
    torch.testing.assert_close(layer(x, reset=mask), expected)
    hx = random_states(layer, 3)
    torch.testing.assert_close(layer(x, hx, reset=mask), layer(x, hx, reset=mask, reset_to=learned))


def test_all_states_at_every_step():
    layer = layer_of("LSTM")
    x, mask = torch.randn(STEPS, 3, 4, **DOUBLE), torch.rand(STEPS, 3) < 0.4
    output, end, (h, c) = layer(x, reset=mask, return_all_states=True)
    torch.testing.assert_close((output, end), layer(x, reset=mask))
    torch.testing.assert_close((h[:, -1], c[:, -1]), end)
    torch.testing.assert_close(h[-1], output)


def test_gradients_of_gradients():
    layer, mask = sk.GRU(2, 3, **DOUBLE), torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    x, h_0, anew = (torch.randn(*shape, **DOUBLE, requires_grad=True) for shape in ((3, 2, 2), (1, 2, 3), (1, 2, 3)))

    def run(x, h_0, anew):
        return layer(x, h_0, reset=mask, reset_to=anew)

    assert torch.autograd.gradcheck(run, (x, h_0, anew))
    assert torch.autograd.gradgradcheck(run, (x, h_0, anew))


def test_two_runs_give_the_same_bits():
    layer, x, mask = sk.GRU(8, 16), torch.randn(40, 16, 8), torch.rand(40, 16) < 0.2
    h_0 = torch.randn(1, 16, 16, requires_grad=True)

    def run():
        output, h_n = layer(x, h_0, reset=mask, reset_to=h_0)
        return output, h_n, *torch.autograd.grad(loss([output], [h_n]), [h_0, *layer.parameters()])

    torch.testing.assert_close(run(), run(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast(dtype):
    layer, x, mask = sk.GRU(4, 5), torch.randn(STEPS, 3, 4), torch.rand(STEPS, 3) < 0.3
    output, h_n = layer(x, reset=mask)
    in_16 = sk.GRU(4, 5, dtype=dtype)
    in_16.load_state_dict(layer.state_dict())
    torch.testing.assert_close(in_16(x.to(dtype), reset=mask)[0].float(), output, rtol=0.05, atol=0.05)
    with torch.autocast(torch.get_default_device().type, dtype):
        torch.testing.assert_close(layer(x, reset=mask)[1].float(), h_n, rtol=0.05, atol=0.05)


# ---- compilers and transforms


SLOW = pytest.param("GRU", "packed unsorted", marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "layout"), [("LSTM projected", "padded"), SLOW])
def test_compiled_calls_give_eager_results_and_gradients(name, layout):
    layer, lengths = layer_of(name), lengths_in(layout)
    x = torch.randn(STEPS, len(lengths), 4, **DOUBLE, requires_grad=True)
    hx, reset_to = (random_states(layer, len(lengths)) for _ in range(2))
    mask = torch.rand(STEPS, len(lengths)) < 0.3
    wanted = [x, *hx, *reset_to, *layer.parameters()]
    outputs, ends = call(layer, layout, x, mask, hx, reset_to)
    expected = *outputs, *ends, *torch.autograd.grad(loss(outputs, ends), wanted)
    torch._dynamo.reset()
    layer.compile(fullgraph=True, backend="aot_eager")
    outputs, ends = call(layer, layout, x, mask, hx, reset_to)
    torch.testing.assert_close((*outputs, *ends, *torch.autograd.grad(loss(outputs, ends), wanted)), expected)
    torch._dynamo.reset()


def test_other_masks_and_sizes_are_no_new_compilation():
    counter = torch._dynamo.testing.CompileCounter()
    layer = sk.GRU(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for steps, share in ((5, 0.0), (5, 0.5), (9, 1.0)):
        x, mask = torch.randn(steps, 3, 4), torch.rand(steps, 3) < share
        torch.testing.assert_close(compiled(x, reset=mask), layer(x, reset=mask))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_cu_seqlens():
    weights, ends = sk.GRU(4, 5)._flat_weights, torch.tensor([0, 3, 3, 7])

    def run(x, mask):
        return sk.functional.gru(x, None, weights, cu_seqlens=ends, max_seqlen=4, reset=mask)

    x, mask = torch.randn(7, 4), torch.rand(7) < 0.4
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x, mask), run(x, mask))


class Masked(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask, lengths=None):
        return self.layer(x, reset=mask, lengths=lengths)


@pytest.mark.parametrize("ragged", [False, True])
def test_an_exported_program_takes_other_sizes(ragged):
    model, steps, sequences = Masked(sk.LSTM(4, 5)), torch.export.Dim("steps"), torch.export.Dim("sequences")

    def inputs(steps: int, sequences: int) -> tuple:
        x, mask = torch.randn(steps, sequences, 4), torch.rand(steps, sequences) < 0.3
        return (x, mask, torch.randint(steps + 1, (sequences,))) if ragged else (x, mask)

    both = {0: steps, 1: sequences}
    shapes = (both, both, {0: sequences}) if ragged else (both, both)
    program = torch.export.export(model, inputs(5, 3), dynamic_shapes=shapes).module()
    for given in (inputs(5, 3), inputs(9, 2)):
        torch.testing.assert_close(program(*given), model(*given))


@pytest.mark.parametrize("masks", ["one mask", "a mask of each"])
def test_transforms_give_what_a_loop_gives(masks):
    layer, xs = sk.GRU(4, 5, **DOUBLE), torch.randn(3, STEPS, 2, 4, **DOUBLE)
    each = torch.rand(3, STEPS, 2) < 0.3
    dim, given = (None, each[0]) if masks == "one mask" else (0, each)
    all_masks = each[:1].expand_as(each) if masks == "one mask" else each

    def run(x, mask):
        return layer(x, reset=mask)

    expected = [torch.stack(r) for r in zip(*map(run, xs, all_masks), strict=True)]
    torch.testing.assert_close(list(torch.vmap(run, (0, dim))(xs, given)), expected)

    def squares(x, mask):
        return run(x, mask)[0].square().sum()

    if masks == "a mask of each":
        with pytest.raises(RuntimeError, match="a mask of its own for each member"):
            torch.vmap(torch.func.grad(squares), (0, dim))(xs, given)
        return
    grads = torch.vmap(torch.func.grad(squares), (0, dim))(xs, given)
    of_each = [torch.func.grad(squares)(x, mask) for x, mask in zip(xs, all_masks, strict=True)]
    torch.testing.assert_close(grads, torch.stack(of_each))


def test_an_ensemble_with_a_mask():
    layers = [sk.LSTM(4, 5, num_layers=2, bidirectional=True, **DOUBLE) for _ in range(3)]
    x, mask = torch.randn(STEPS, 2, 4, **DOUBLE), torch.rand(STEPS, 2) < 0.3
    parameters, _ = torch.func.stack_module_state(layers)
    run = torch.vmap(lambda p: torch.func.functional_call(layers[0], p, (x,), {"reset": mask})[0])
    found, expected = run(parameters), torch.stack([layer(x, reset=mask)[0] for layer in layers])
    torch.testing.assert_close(found, expected)
    grads = torch.autograd.grad(found.square().sum(), list(parameters.values()))
    of_each = [
        torch.autograd.grad(y.square().sum(), list(layer.parameters()), retain_graph=True)
        for y, layer in zip(expected, layers, strict=True)
    ]
    torch.testing.assert_close(list(grads), [torch.stack(of_one) for of_one in zip(*of_each, strict=True)])


def test_fx_traces_a_mask():
    model = Masked(sk.GRU(4, 5))
    x, mask = torch.randn(STEPS, 2, 4), torch.rand(STEPS, 2) < 0.3
    torch.testing.assert_close(torch.fx.symbolic_trace(model, {"lengths": None})(x, mask), model(x, mask))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_trace_takes_other_masks(on_cpu, monkeypatch):
    model = Masked(sk.GRU(4, 5))
    monkeypatch.setattr(resets, "on_cpu", lambda *_: on_cpu)
    x, masks = torch.randn(STEPS, 2, 4), [torch.rand(STEPS, 2) < share for share in (0.5, 0.8, 0.0, 1.0)]
    with torch.no_grad():
        traced = torch.jit.trace(model, (x, masks[0].index_fill(0, torch.tensor(2), True)))
        for mask in masks:
            torch.testing.assert_close(traced(x, mask), model(x, mask))


def test_explain_takes_a_mask():
    asked = sk.GRU(4, 5), torch.randn(3, 2, 4)
    mask = torch.ones(3, 2, dtype=torch.bool)
    plan, of_all_states = sk.explain(*asked, reset=mask), sk.explain(*asked, reset=mask, return_all_states=True)
    assert of_all_states.backend == plan.backend
    if plan.backend == "cpu":
        assert "pieces side by side" in of_all_states.kernel and "pieces side by side" not in plan.kernel


# ---- on a GPU, for which tensors on the CPU pass


@pytest.mark.parametrize("layout", ["padded", "lengths", "cu_seqlens", "packed"])
@pytest.mark.parametrize("bounded", [False, True], ids=["counted", "in a CUDA graph"])
def test_masks_on_a_gpu_give_the_same(bounded, layout, monkeypatch):
    layer, lengths = layer_of("LSTM projected"), lengths_in(layout)
    x, mask = torch.randn(STEPS, len(lengths), 4, **DOUBLE, requires_grad=True), torch.rand(STEPS, len(lengths)) < 0.3
    hx = random_states(layer, len(lengths))
    expected = call(layer, layout, x, mask, hx)
    monkeypatch.setattr(late_checks, "out_of_sight", lambda values: True)
    monkeypatch.setattr(pieces, "may_read", lambda marks: not bounded)
    found = call(layer, layout, x, mask, hx)
    torch.testing.assert_close(tuple(map(tuple, found)), tuple(map(tuple, expected)))
    wanted = [x, *hx, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(loss(*results), wanted) for results in (found, expected)))


@pytest.mark.parametrize(
    "options", [{"lengths": [3, 9, -2]}, {"cu_seqlens": [0, 4, 2, 5]}, {"cu_seqlens": [1, 4, 9]}], ids=str
)
def test_lengths_on_a_gpu_that_do_not_fit_are_told_and_read_nothing_else(options, monkeypatch):
    monkeypatch.setattr(late_checks, "out_of_sight", lambda values: True)
    monkeypatch.delenv("SEQKERNELS_CHECK", raising=False)
    layer, options = sk.GRU(4, 5), {name: torch.tensor(values) for name, values in options.items()}
    shape = (6,) if "cu_seqlens" in options else (6, 3)
    x, mask = torch.randn(*shape, 4, requires_grad=True), torch.ones(shape, dtype=torch.bool)
    with monkeypatch.context() as patch:
        patch.setattr(late_checks, "look", lambda: None)  # which may see it within the call
        output, h_n = sk.functional.gru(x, None, layer._flat_weights, reset=mask, max_seqlen=4, **options)
        output.sum().backward()
    assert output.isfinite().all() and h_n.isfinite().all() and x.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"lengths must lie|cu_seqlens must start"):
        late_checks.look()
    late_checks._notes.clear()


# ---- what is refused, before anything runs

MASK = torch.zeros(6, 3, dtype=torch.bool)
BAD_MASKS = {
    "floats": (MASK.float(), TypeError, "reset is a mask of torch.bool, got a tensor of torch.float32"),
    "integers": (MASK.long(), TypeError, "reset is a mask of torch.bool, got a tensor of torch.int64"),
    "a list": ([[True] * 3] * 6, TypeError, "reset is a mask of torch.bool, got a list"),
    "transposed": (MASK.t(), ValueError, r"reset is \[6, 3\], one for each step of the input, got the shape \[3, 6\]"),
    "one of all": (MASK[:, 0], ValueError, r"reset is \[6, 3\].*got the shape \[6\]"),
    "features": (MASK.unsqueeze(2), ValueError, r"reset is \[6, 3\].*got the shape \[6, 3, 1\]"),
    "elsewhere": (MASK.to("meta"), ValueError, "reset is on the CPU or where the input is, found .* meta"),
    "packed": (pack_padded_sequence(MASK, [6, 5, 1]), TypeError, "got a PackedSequence"),
}


@pytest.mark.parametrize("bad", BAD_MASKS)
@pytest.mark.parametrize("options", [{}, {"lengths": [6, 2, 0]}], ids=["padded", "lengths"])
def test_bad_masks_are_refused(bad, options):
    mask, error, message = BAD_MASKS[bad]
    with pytest.raises(error, match=message):
        sk.LSTM(4, 5)(torch.randn(6, 3, 4), reset=mask, **options)


def test_bad_masks_of_rows_are_refused():
    layer, x = sk.GRU(4, 5), pack_padded_sequence(torch.randn(6, 3, 4), [6, 4, 2])
    with pytest.raises(ValueError, match=r"reset is \[12\].*got the shape \[6, 3\]"):
        layer(x, reset=MASK)
    with pytest.raises(ValueError, match="reset has other batch_sizes than the input"):
        layer(x, reset=pack_padded_sequence(MASK, [5, 5, 2]))
    with pytest.raises(ValueError, match="reset has other sorted_indices than the input"):
        layer(x, reset=pack_padded_sequence(MASK, [2, 4, 6], enforce_sorted=False))
    x, mask = (
        torch.nested.nested_tensor([t[:3, 0], t[:4, 1]], layout=torch.jagged) for t in (torch.randn(6, 3, 4), MASK)
    )
    other = torch.nested.nested_tensor([MASK[:4, 0], MASK[:3, 1]], layout=torch.jagged)
    with pytest.raises(ValueError, match="reset has other offsets than the input"):
        layer(x, reset=other)
    with pytest.raises(ValueError, match=r"reset is \[7\].*got the shape \[6, 3\]"):
        layer(x, reset=MASK)
    with pytest.raises(ValueError, match=r"reset is \[6, 3\].*got a nested tensor"):
        layer(torch.randn(6, 3, 4), reset=mask)


def test_bad_states_are_refused():
    layer, lstm, x = sk.GRU(4, 5), sk.LSTM(4, 5), torch.randn(6, 3, 4)
    with pytest.raises(ValueError, match="reset_to is the state before steps that reset marks; give reset as well"):
        layer(x, reset_to=torch.zeros(1, 3, 5))
    with pytest.raises(RuntimeError, match=r"Expected reset_to size \(1, 3, 5\), got \[1, 1, 5\]"):
        layer(x, reset=MASK, reset_to=torch.zeros(1, 1, 5))
    with pytest.raises(RuntimeError, match=r"reset_to tensor dtype \(torch.float64\) does not match input dtype"):
        layer(x, reset=MASK, reset_to=torch.zeros(1, 3, 5, **DOUBLE))
    for state in (torch.zeros(1, 3, 5), 3):
        with pytest.raises(TypeError, match="LSTM: reset_to must be a tuple of two Tensors"):
            lstm(x, reset=MASK, reset_to=state)
    with pytest.raises(TypeError, match="LSTM: reset_to must be a tuple of two Tensors, not of a NoneType"):
        lstm(x, reset=MASK, reset_to=(None, None))
    with pytest.raises(TypeError, match="GRU: reset_to must be a Tensor, not a tuple"):
        layer(x, reset=MASK, reset_to=(torch.zeros(1, 3, 5),) * 2)
    with pytest.raises(RuntimeError, match=r"Expected reset_to\[1\] size \(1, 3, 5\), got \[1, 3, 4\]"):
        lstm(x, reset=MASK, reset_to=(torch.zeros(1, 3, 5), torch.zeros(1, 3, 4)))


def test_what_knows_no_resets_says_so():
    layer, x, mask = sk.GRU(4, 5), torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"call_for_per_sample_grads knows torch\.nn's layers"):
        call_for_per_sample_grads(layer, batch_size=2, batch_first=False)(x, reset=mask)
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="ONNX's operators know no resets"):
        torch.onnx.export(Masked(layer).eval(), (x, mask), dynamo=True, verbose=False)
