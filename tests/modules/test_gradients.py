"""First and second derivatives by finite differences, through modules, on every backend."""

import pytest
import torch
from cases import CELLS, Case, on_device
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

import seqkernels as sk


def function_of(case: Case, backend: str):
    """The module as a function of input, states and weights."""
    module = case.module(sk)
    module.backend = backend
    names = [name for name, _ in module.named_parameters()]
    x, states = case.data()

    def function(x, *rest):
        states, weights = rest[: len(rest) - len(names)], rest[len(rest) - len(names) :]
        hx = states if case.cell == "lstm" else states[0]
        lengths = on_device(case.lengths, backend) if case.layout == "lengths" else None
        call = (x, hx), {"lengths": lengths}
        output, final = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), *call)
        return (output, *final) if case.cell == "lstm" else (output, final)

    weights = tuple(parameter.detach().clone().requires_grad_() for parameter in module.parameters())
    return function, (x, *states, *weights)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layout", ["padded", "lengths"])
def test_first_and_second_derivatives_equal_finite_differences(cell, layout, backend):
    if backend == "triton":
        pytest.skip("finite differences need float64, which Triton's kernels do not take")
    lengths = (3, 3) if layout == "padded" else (1, 3, 0)
    projected = 2 if cell == "lstm" else 0
    case = Case(cell, torch.float64, layout, lengths, 2, 3, projected, bidirectional=layout == "lengths", seed=3)
    function, inputs = function_of(case, backend)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_third_derivative_exists(cell, backend, dtype):
    case = Case(cell, dtype, lengths=(2, 2), input_size=2, hidden_size=2)
    function, (x, *rest) = function_of(case, backend)
    value = function(x, *rest)[0].pow(3).sum()
    for _ in range(3):
        value = torch.autograd.grad(value, x, create_graph=True)[0].pow(2).sum()
    assert value.isfinite()


def test_a_second_derivative_that_is_zero_exists(backend):
    """What a relu RNN gives x as a gradient does not depend on its bias: zero, as torch.nn says, and no error."""
    found = []
    for namespace in (torch.nn, sk):
        torch.manual_seed(0)
        module, x = namespace.RNN(4, 5, nonlinearity="relu"), torch.randn(3, 2, 4, requires_grad=True)
        if namespace is sk:
            module.backend = backend
        (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_works_in_eval_mode(cell, backend):
    case = Case(cell, num_layers=2)
    module = case.module(sk).eval()
    module.backend = backend
    module(case.data()[0])[0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("wanted", ["x", "h_0", "weight_hh_l0", "output only", "state only"])
def test_a_gradient_asked_for_alone_equals_the_one_among_all(cell, wanted, backend, dtype):
    def gradients(only: str) -> dict[str, torch.Tensor]:
        case = Case(cell, dtype)
        module = case.module(sk)
        module.backend = backend
        x, states = case.data()
        named = {"x": x, "h_0": states[0], **dict(module.named_parameters())}
        for name, tensor in named.items():
            tensor.requires_grad_(only not in named or name == only)
        output, final = module(x, states if cell == "lstm" else states[0])
        final = final[0] if cell == "lstm" else final
        loss = output.pow(2).sum() if only != "state only" else final.sum()
        (loss + final.sum() if only not in ("output only", "state only") else loss).backward()
        return {name: tensor.grad for name, tensor in named.items()}

    found = gradients(wanted)
    if wanted in ("output only", "state only"):
        assert all(grad is not None and grad.isfinite().all() for grad in found.values())
    else:
        torch.testing.assert_close(found[wanted], gradients("all of them")[wanted])
        assert [name for name, grad in found.items() if grad is not None] == [wanted]


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("steps", [1, 2])
def test_what_has_no_part_in_the_loss_has_no_gradient_as_in_torch_nn(steps, layout, used, sequences):
    options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    expected, ours = nn.LSTM(4, 5, **options), sk.LSTM(4, 5, **options)
    ours.load_state_dict(expected.state_dict())
    x = torch.randn(steps, sequences, 4)
    for module in (expected, ours):
        output, (h_n, c_n) = module(pack_padded_sequence(x, [steps] * sequences) if layout == "packed" else x)
        output = output.data if layout == "packed" else output
        sum((output, h_n, c_n)[k].sum() for k in used).backward()
    for name, parameter in expected.named_parameters():
        found = ours.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            torch.testing.assert_close(found, parameter.grad, msg=name)
