"""Steps of a stream: those of a whole sequence, to the bit on the CPU's kernels."""

import pytest
import torch

import seqkernels as sk
from seqkernels import select
from seqkernels.hardware import machine_of
from seqkernels.streaming import FEW_ROWS

LAYERS = {
    "RNN": ("RNN", {"nonlinearity": "relu"}),
    "GRU": ("GRU", {"num_layers": 3, "batch_first": True}),
    "LSTM": ("LSTM", {"num_layers": 2, "bias": False}),
    "LSTM projected": ("LSTM", {"proj_size": 3, "num_layers": 2}),
    "LiGRU": ("LiGRU", {}),
}


def layer_of(name: str, dtype=torch.float32):
    torch.manual_seed(0)
    cls, options = LAYERS[name]
    return getattr(sk, cls)(4, 5, **options, dtype=dtype)


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else state


def whole(layer, x):
    y, state = layer(x.transpose(0, 1) if layer.batch_first else x)
    return y.transpose(0, 1) if layer.batch_first else y, state


def stepped(layer, x, state=None):
    ys = []
    for x_t in x:
        y, state = layer.step(x_t, state)
        ys.append(y)
    return torch.stack(ys), state


@pytest.mark.parametrize("name", LAYERS)
def test_steps_give_the_sequence(name, backend, dtype):
    layer, x = layer_of(name, dtype), torch.randn(4, 3, 4, dtype=dtype)
    layer.backend = backend
    torch.testing.assert_close(stepped(layer, x), whole(layer, x))


@pytest.mark.parametrize("features", [128, 130, 400])  # products of more than 128 are added up in several sums
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_bits_depend_on_no_batch_and_no_cut(name, features):
    layer, x = getattr(sk, name)(features, 144), torch.randn(6, 64, features)
    layer.backend = "cpu"
    if against := select.unsupported("cpu", select.Call("gru", x.device.type, x.dtype), machine_of(x.device)):
        pytest.skip(against)
    with torch.no_grad():
        y, _ = layer(x)
        first, state = layer(x[:1])
        torch.testing.assert_close(torch.cat([first, layer(x[1:], state)[0]]), y, rtol=0, atol=0)
        torch.testing.assert_close(stepped(layer, x)[0], y, rtol=0, atol=0)
        for sequences in (9, 16, 33):
            torch.testing.assert_close(layer(x[:2, :sequences])[0], y[:2, :sequences], rtol=0, atol=0)
        torch.set_num_threads(2)
        torch.testing.assert_close(layer(x)[0], y, rtol=0, atol=0)


@pytest.mark.parametrize("sequences", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_have_the_bits_of_the_sequence(name, dtype, sequences):
    layer, x = layer_of(name, dtype), torch.randn(FEW_ROWS + 1, sequences, 4, dtype=dtype)
    layer.backend = "cpu"
    if against := select.unsupported("cpu", select.Call("gru", x.device.type, dtype), machine_of(x.device)):
        pytest.skip(against)
    torch.testing.assert_close(stepped(layer, x), whole(layer, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_one_stream_needs_no_batch(name):
    layer, x = layer_of(name), torch.randn(4, 4)
    (y, state), (batched, of_batch) = stepped(layer, x), stepped(layer, x[:, None])
    torch.testing.assert_close(y, batched[:, 0])
    for one, expected in zip(as_tuple(state), as_tuple(of_batch), strict=True):
        torch.testing.assert_close(one, expected[:, 0])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_go_through_steps(name):
    layer, x = layer_of(name, torch.float64), torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)

    def gradients(run):
        y, state = run(layer, x)
        loss = y.square().sum() + sum(s.sin().sum() for s in as_tuple(state))
        return torch.autograd.grad(loss, [x, *layer.parameters()])

    torch.testing.assert_close(gradients(stepped), gradients(whole))


@pytest.mark.parametrize("name", LAYERS)
def test_out_is_written_and_may_hold_the_given_state(name):
    layer, x = layer_of(name), torch.randn(4, 3, 4)
    with torch.no_grad():
        expected, end = stepped(layer, x)
        y, state = layer.step(x[0])
        places = [t.data_ptr() for t in (y, *as_tuple(state))]
        for x_t in x[1:]:
            y, state = layer.step(x_t, state, out=(y, state))
    assert places == [t.data_ptr() for t in (y, *as_tuple(state))]
    torch.testing.assert_close((y, state), (expected[-1], end), rtol=0, atol=0)


def test_an_out_that_does_not_fit_is_refused_and_nothing_written():
    layer, x, y = layer_of("LSTM projected"), torch.randn(3, 4), torch.zeros(3, 3)
    state = torch.zeros(2, 3, 3), torch.zeros(2, 3, 5)
    with pytest.raises(RuntimeError, match="no gradients"):
        layer.step(x, out=(y, state))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"\[2, 3, 3\] of .* where the step gives \[2, 3, 5\]"):
            layer.step(x, out=(y, (state[0], state[0])))
        with pytest.raises(RuntimeError, match="2 tensors of state, got 1"):
            layer.step(x, out=(y, state[0]))
        for out in (y, (y,), 3, ("y", state)):
            with pytest.raises(TypeError, match=r"out is \(y, state\)"):
                layer.step(x, out=out)
    assert not y.any() and not state[0].any()


def test_what_is_no_step_is_refused():
    with pytest.raises(ValueError, match="bidirectional layer has no step"):
        sk.GRU(4, 5, bidirectional=True).step(torch.randn(3, 4))
    with pytest.raises(ValueError, match="got 3 dimensions"):
        sk.GRU(4, 5).step(torch.randn(1, 3, 4))
    with pytest.raises(RuntimeError, match="input_size"):
        sk.GRU(4, 5).step(torch.randn(3, 5))
    with pytest.raises(TypeError, match="a step takes a Tensor, got a list"):
        sk.GRU(4, 5).step([1.0, 2.0])


def test_steps_compile():
    layer, x = layer_of("GRU"), torch.randn(4, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x_t, state: layer.step(x_t, state), fullgraph=True, backend="aot_eager")
    state = torch.zeros(3, 3, 5)
    torch.testing.assert_close(compiled(x[0], state), layer.step(x[0], state))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_step_can_be_captured_in_a_graph():
    layer, x = layer_of("LSTM").cuda(), torch.randn(4, 3, 4, device="cuda")
    y, state = torch.zeros(3, 5).cuda(), (torch.zeros(2, 3, 5).cuda(), torch.zeros(2, 3, 5).cuda())
    x_t = x[0].clone()
    with torch.inference_mode():
        expected, _ = stepped(layer, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.step(x_t, state, out=(y, state))
        for tensor in state:
            tensor.zero_()
        for one, of_step in zip(x, expected, strict=True):
            x_t.copy_(one)
            graph.replay()
            torch.testing.assert_close(y, of_step)
