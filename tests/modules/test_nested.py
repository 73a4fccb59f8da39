"""Nested tensors of the jagged layout: in and out, with gradients, and nothing padded."""

import pytest
import torch

import seqkernels as sk

LAYERS = {
    "RNN": {},
    "GRU": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "LSTM": {"num_layers": 2, "proj_size": 3},
    "LiGRU": {"bidirectional": True},
}
STEPS = (3, 6, 0, 1)


def layer_of(name: str, **options):
    torch.manual_seed(0)
    return getattr(sk, name)(4, 5, **LAYERS[name], dtype=torch.float64, **options)


def sequences() -> list[torch.Tensor]:
    return [torch.randn(steps, 4, dtype=torch.float64) for steps in STEPS]


def nested(tensors, **options) -> torch.Tensor:
    return torch.nested.nested_tensor(tensors, layout=torch.jagged, **options)


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else state


def padded(layer, tensors):
    """Results and gradients of the same sequences, padded."""
    x = torch.nn.utils.rnn.pad_sequence(tensors, layer.batch_first).requires_grad_()
    return x, layer(x, lengths=STEPS)


@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_those_of_a_padded_batch(name, backend):
    if backend == "triton":
        pytest.skip("Triton's kernels do not compute in float64")
    layer, tensors = layer_of(name), sequences()
    layer.backend = backend
    x = nested(tensors, requires_grad=True)
    output, end = layer(x)
    of_padded, (expected, expected_end) = padded(layer, tensors)
    first = (lambda t: t) if layer.batch_first else (lambda t: t.transpose(0, 1))
    for y, row, steps in zip(output.unbind(), first(expected), STEPS, strict=True):
        torch.testing.assert_close(y, row[:steps])
    torch.testing.assert_close(end, expected_end)

    def loss(y, end):
        return y.square().sum() + sum(s.sin().sum() for s in as_tuple(end))

    wanted = list(layer.parameters())
    of_x, *grads = torch.autograd.grad(loss(output.values(), end), [x, *wanted])
    of_padded, *others = torch.autograd.grad(loss(expected, expected_end), [of_padded, *wanted])
    torch.testing.assert_close(grads, others)
    assert of_x.is_nested
    for grad, row, steps in zip(of_x.unbind(), first(of_padded), STEPS, strict=True):
        torch.testing.assert_close(grad, row[:steps])


def test_the_operator_gets_no_padding(monkeypatch):
    rows = []
    run = sk.functional.run
    monkeypatch.setattr(
        sk.functional, "run", lambda plan, inputs, *args: rows.append(inputs.rows.data) or run(plan, inputs, *args)
    )
    layer_of("GRU")(nested(sequences()))
    assert [len(data) for data in rows] == [sum(STEPS)]


def test_from_jagged_and_back():
    layer, values, offsets = layer_of("LSTM"), torch.cat(sequences()), torch.tensor([0, 3, 9, 9, 10])
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    output, _ = layer(x)
    assert output.offsets() is x.offsets()
    again = torch.nested.nested_tensor_from_jagged(output.values(), offsets)
    torch.testing.assert_close(list(again.unbind()), [layer(s)[0] if len(s) else s[:, :3] for s in sequences_of(x)])


def sequences_of(x) -> list[torch.Tensor]:
    return list(x.unbind())


def test_the_output_adds_to_the_input():
    x = nested(sequences())
    output, _ = sk.GRU(4, 4, dtype=torch.float64)(x)
    torch.testing.assert_close((output + x).values(), output.values() + x.values())


def test_gaps_between_sequences_are_closed():
    layer, dense = layer_of("GRU"), torch.randn(3, 6, 4, dtype=torch.float64)
    starts, lengths = torch.tensor([0, 2, 1]), torch.tensor([3, 4, 5])
    x = torch.nested.narrow(dense, 1, starts, lengths, layout=torch.jagged)
    output, _ = layer(x)
    for y, row, start, length in zip(output.unbind(), dense, starts, lengths, strict=True):
        torch.testing.assert_close(y, layer(row[start : start + length])[0])


def test_given_and_learned_states_and_all_states():
    layer, tensors = layer_of("LSTM", learn_initial_state=True, return_all_states=True), sequences()
    torch.nn.init.normal_(layer.initial_h)
    x = nested(tensors)
    output, end, (h, c) = layer(x)
    assert h.shape == (2, sum(STEPS), 3) and c.shape == (2, sum(STEPS), 5)
    torch.testing.assert_close(h[-1], output.values())
    given = tuple(s.unsqueeze(1).expand(-1, len(STEPS), -1) for s in (layer.initial_h, layer.initial_c))
    torch.testing.assert_close(layer(x, given)[1], end)


def test_nested_batches_compile():
    layer, x = layer_of("GRU"), nested(sequences())
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (y, end), (expected, expected_end) = compiled(x), layer(x)
    torch.testing.assert_close((y.values(), end), (expected.values(), expected_end))


def test_what_is_not_jagged_sequences_is_refused():
    layer = layer_of("GRU")
    with pytest.raises(ValueError, match="jagged layout"):
        layer(torch.nested.nested_tensor(sequences()[:2], layout=torch.strided))
    with pytest.raises(ValueError, match="has its lengths in it"):
        layer(nested(sequences()), lengths=STEPS)
