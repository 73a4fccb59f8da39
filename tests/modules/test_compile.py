"""torch.compile(fullgraph=True) with no flag set: every module and cell, every layout, forward and backward."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels as sk

OPTIONS = {
    "RNN": {"nonlinearity": "relu", "batch_first": True},
    "GRU": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "LSTM": {"bidirectional": True, "proj_size": 3},
}
LENGTHS = torch.tensor([3, 6, 1, 4], device="cpu")


def module_of(name: str):
    torch.manual_seed(0)
    return getattr(sk, name)(4, 5, **OPTIONS[name]).eval()


def inputs_of(name: str) -> dict[str, tuple[tuple, dict]]:
    """(arguments, keyword arguments) of a call for each layout."""
    options = OPTIONS[name]
    first = options.get("batch_first", False)
    x = torch.randn(4, 6, 4) if first else torch.randn(6, 4, 4)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = torch.randn(rows, 4, options.get("proj_size", 5))
    hx = (hx, torch.randn(rows, 4, 5)) if name == "LSTM" else hx
    packed = pack_padded_sequence(x, LENGTHS, batch_first=first, enforce_sorted=False)
    return {
        "padded": ((x,), {}),
        "padded, state": ((x, hx), {}),
        "unbatched": ((x[0],), {}),
        "lengths": ((x,), {"lengths": torch.tensor([3, 6, 0, 4])}),
        "packed": ((packed,), {}),
        "packed, state": ((packed, hx), {}),
        "packed, sorted": ((pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2]),), {}),
    }


def results(module, args, kwargs) -> list[torch.Tensor]:
    output, state = module(*args, **kwargs)
    output = output.data if isinstance(output, PackedSequence) else output
    state = state if isinstance(state, tuple) else (state,)
    loss = output.square().sum() + sum(s.square().sum() for s in state)
    return [output, *state, *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", inputs_of("GRU"))
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_module_gives_eager_results_and_gradients(name, layout):
    module, (args, kwargs) = module_of(name), inputs_of(name)[layout]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(results(compiled, args, kwargs), results(module, args, kwargs), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("layout", ["padded", "lengths", "packed"])
def test_inductor_gives_eager_results_and_gradients(layout):
    module, (args, kwargs) = module_of("GRU"), inputs_of("GRU")[layout]
    compiled = torch.compile(module, fullgraph=True)
    for ours, expected in zip(results(compiled, args, kwargs), results(module, args, kwargs), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_compiled_cell_gives_eager_results(name):
    cell, x = getattr(sk, name)(4, 5), torch.randn(3, 4)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cell(x))
    torch.testing.assert_close(compiled(x[0]), cell(x[0]))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_graph_does_not_grow_with_steps(name):
    """The compile time is that of the graph, and the recurrence is one node of it."""

    def nodes(steps: int) -> int:
        counted = []

        def backend(graph, example_inputs):
            counted.append(len(graph.graph.nodes))
            return graph.forward

        torch._dynamo.reset()
        torch.compile(module_of(name), fullgraph=True, backend=backend)(torch.randn(4, steps, 4))
        return sum(counted)

    assert nodes(10) == nodes(1000)


def test_another_number_of_steps_is_no_new_compilation():
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(sk.GRU(4, 5), fullgraph=True, dynamic=True, backend=backend)
    for steps in (3, 7, 50, 201):
        compiled(torch.randn(steps, 2, 4))
    assert len(compilations) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("max_seqlen", [4, 1 << 40])
def test_compiled_cu_seqlens_with_a_bound_of_them_give_eager_results(max_seqlen, dynamic):
    weights = sk.GRU(4, 5)._flat_weights

    def run(x, cu_seqlens):
        return sk.functional.gru(x, None, weights, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for ends in ([0, 3, 3, 7], [0, 1, 2]):
        x = torch.randn(ends[-1], 4)
        torch.testing.assert_close(compiled(x, torch.tensor(ends)), run(x, torch.tensor(ends)))


def test_bad_lengths_are_refused_when_compiled(monkeypatch):
    monkeypatch.setenv("SEQKERNELS_CHECK", "1")
    compiled = torch.compile(sk.GRU(4, 5), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(6, 3, 4), lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="between 0 and the 6 steps"):
        compiled(torch.randn(6, 3, 4), lengths=torch.tensor([1, 2, 7]))


def test_modules_made_under_patch_torch_compile_there():
    with sk.patch_torch():
        module, x = torch.nn.GRU(4, 5), torch.randn(6, 3, 4)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("layout", ["padded", "lengths"])
def test_other_sizes_in_training_are_no_new_compilation(layout):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = sk.GRU(4, 5, num_layers=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for steps, sequences in ((3, 2), (7, 2), (50, 3)):
        x = torch.randn(steps, sequences, 4)
        options = {} if layout == "padded" else {"lengths": torch.randint(steps + 1, (sequences,))}
        results(compiled, (x,), options)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
