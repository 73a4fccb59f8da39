"""torch's own kernels as a backend: what our modules promise beyond torch.nn holds there, or is refused."""

import warnings

import pytest
import torch
from cases import TORCH_CELLS, Case, on_device
from specification import NO_CUDNN
from torch import nn

import seqkernels as sk
from seqkernels.backends.cudnn import host

pytestmark = pytest.mark.skipif(bool(NO_CUDNN), reason=str(NO_CUDNN))


def module_of(cell: str, backend: str = "cudnn", **options) -> nn.Module:
    module = Case(cell, torch.float64, hidden_size=6, **options).module(sk)
    module.backend = backend
    return module


def results(module: nn.Module, x: torch.Tensor, *args, **kwargs) -> list[torch.Tensor]:
    module.zero_grad()
    output, final = module(x, *args, **kwargs)
    final = final if isinstance(final, tuple) else (final,)
    (output.pow(2).sum() + sum(state.sum() for state in final)).backward()
    return [output, *final, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["padded", "ragged", "one length", "empty"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_results_are_those_of_torch_eager(cell, layout, bias):
    lengths = {"padded": None, "ragged": (3, 0, 5), "one length": (4, 4, 4), "empty": (0, 0, 0)}[layout]
    options = {"num_layers": 2, "bidirectional": True, "bias": bias, "proj_size": 2 if cell == "lstm" else 0}
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    given = {} if lengths is None else {"lengths": on_device(lengths, "cudnn")}
    found = results(module_of(cell, **options), x, **given)
    torch.testing.assert_close(found, results(module_of(cell, "torch_eager", **options), x, **given))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_weights_stay_where_they_are_and_nothing_is_said(cell):
    """torch.nn would warn that weights are not part of a single contiguous chunk of memory."""
    module, x = module_of(cell), torch.randn(5, 3, 4, dtype=torch.float64)
    before = [parameter.data_ptr() for parameter in module.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(module, x)
    assert [parameter.data_ptr() for parameter in module.parameters()] == before
    with torch.no_grad():
        expected = module(x)[0]
        module.weight_hh_l0.mul_(2)
        assert not torch.equal(module(x)[0], expected), "weights are read anew in every call"


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_weights_that_lie_as_cudnn_reads_them_are_not_copied(cell):
    module, x = module_of(cell, num_layers=2, bidirectional=True), torch.randn(5, 3, 4, dtype=torch.float64)
    expected = module(x)[0]
    weights = list(module.parameters())
    call = host._Call(cell, 2, x.flatten(0, 1), weights, torch.zeros(4, 3, 6), None, None)
    copy = host._flat(weights, *call.layout)
    assert copy.data_ptr() not in [w.data_ptr() for w in weights]
    total, places = host._layout(*call.layout)
    with torch.no_grad():
        for weight, place in zip(weights, places, strict=True):
            weight.set_(copy[place : place + weight.numel()].view(weight.shape))
    flat = host._flat(weights, *call.layout)
    assert flat.data_ptr() == weights[0].data_ptr() == copy.data_ptr() and flat.shape == (total,)
    assert torch.equal(module(x)[0], expected)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_what_lies_behind_weights_in_their_memory_is_not_taken_for_biases(cell):
    """torch.nn.utils.vector_to_parameters lets a model's parameters lie one behind the other."""
    module, x = module_of(cell, bias=False), torch.randn(5, 3, 4, dtype=torch.float64)
    parameters = [*module.parameters(), nn.Parameter(torch.ones(99, dtype=torch.float64))]
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(parameters), parameters)
    found = results(module, x)
    module.backend = "torch_eager"
    torch.testing.assert_close(found, results(module, x))


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_a_graph_that_is_kept_can_be_gone_through_again(cell):
    """cuDNN's backward spoils what its forward has saved."""
    module, x = module_of(cell), torch.randn(5, 3, 4, dtype=torch.float64)
    loss = module(x)[0].pow(2).sum()
    weights = list(module.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_dropout_draws_the_numbers_of_other_backends_and_has_two_derivatives(cell):
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def derivatives(backend: str) -> list[torch.Tensor]:
        module = module_of(cell, backend, num_layers=3)
        module.dropout = 0.4
        torch.manual_seed(7)
        output = module(x)[0]
        (first,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
        return [output, first, *torch.autograd.grad(first.pow(2).sum(), [x, *module.parameters()], allow_unused=True)]

    for found, expected in zip(derivatives("cudnn"), derivatives("torch_eager"), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_autocast_gives_its_dtype(cell, dtype):
    """Under torch's own rule cuDNN computes in float16, whatever autocast's dtype."""
    module, x = Case(cell, num_layers=2).module(sk), torch.randn(5, 3, 4)
    module.backend = "cudnn"
    with torch.autocast(x.device.type, dtype=dtype):
        output, final = module(x)
    assert output.dtype == dtype and (final[0] if cell == "lstm" else final).dtype == dtype
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


def test_what_cudnn_does_not_take_is_refused():
    module, x = module_of("gru"), torch.randn(5, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="at most 65535 steps"):
        module(torch.zeros(65536, 1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"torch\.func transforms"):
        torch.vmap(lambda x: module(x)[0])(x[None])
    cell = sk.GRUCell(4, 5)
    cell.backend = "cudnn"
    with pytest.raises(ValueError, match="not for a cell"):
        cell(torch.randn(3, 4))
    # Not by assignment: PyTorch's own test helpers, once imported, freeze the switches.
    with torch.backends.cudnn.flags(enabled=False), pytest.raises(ValueError, match="enabled is False"):
        module(x)


def test_compiled_code_is_refused():
    module, x = module_of("gru"), torch.randn(5, 3, 4, dtype=torch.float64)
    with pytest.raises(Exception, match=r"torch\.compile needs an operator"):
        torch.compile(module, backend="eager", fullgraph=True)(x)


def test_torchs_operators_take_what_they_are_given():
    """No machine here runs them, so that a change of theirs would show nowhere else."""
    operators = torch.ops.aten
    shared = "mode hidden_size proj_size num_layers batch_first dropout train bidirectional batch_sizes dropout_state"
    for operator, names in (
        (operators._cudnn_rnn, f"input weight weight_stride0 weight_buf hx cx {shared}"),
        (
            operators._cudnn_rnn_backward,
            "input weight weight_stride0 weight_buf hx cx output grad_output grad_hy grad_cy "
            f"{shared} reserve output_mask",
        ),
        (
            operators._cudnn_rnn_flatten_weight,
            "weight_arr weight_stride0 input_size mode hidden_size proj_size num_layers batch_first bidirectional",
        ),
    ):
        assert [argument.name for argument in operator.default._schema.arguments] == names.split()


@pytest.mark.parametrize("batch_sizes", [None, (3, 2, 2)], ids=str)
@pytest.mark.parametrize("projected", [0, 2])
def test_torchs_own_rule_of_shapes_is_met(projected, batch_sizes, monkeypatch):
    """torch describes its operator for tensors without memory; the backward it describes nowhere."""
    module = Case("lstm", hidden_size=6, num_layers=2, bidirectional=True, proj_size=projected).module(sk).to("meta")
    x = torch.empty(9 if batch_sizes is None else sum(batch_sizes), 4, device="meta")
    h_0, c_0 = (torch.empty(4, 3, size, device="meta") for size in (projected or 6, 6))
    sizes = None if batch_sizes is None else torch.tensor(batch_sizes, device="cpu")
    monkeypatch.setattr(host, "_flat", lambda weights, *layout: weights[0].new_empty(1))
    y, h_n, c_n, _ = host.forward("lstm", 2, x, module._flat_weights, h_0, c_0, sizes, True)
    assert (y.shape, h_n.shape, c_n.shape) == ((len(x), 2 * (projected or 6)), h_0.shape, c_0.shape)
