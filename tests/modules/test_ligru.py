"""LiGRU, the module that torch.nn has not: its parameters, its errors, and the places of other modules it has.

Its numbers are judged with those of the other cells: test_specification, and every test of operators.
"""

import pytest
import torch
from torch import nn

import seqkernels as sk


def test_parameters_have_two_gates_and_the_names_of_torch():
    module = sk.LiGRU(4, 5, num_layers=2, bidirectional=True)
    shapes = {name: tuple(weight.shape) for name, weight in module.named_parameters()}
    reverse = {f"{name}_reverse": shape for name, shape in shapes.items() if not name.endswith("_reverse")}
    assert shapes == reverse | {name: shape for name, shape in shapes.items() if not name.endswith("_reverse")}
    assert shapes["weight_ih_l0"] == (10, 4) and shapes["weight_ih_l1"] == (10, 10)
    assert shapes["weight_hh_l0"] == shapes["weight_hh_l1"] == (10, 5) and shapes["bias_hh_l1"] == (10,)
    assert [*sk.LiGRU(4, 5, bias=False).state_dict()] == ["weight_ih_l0", "weight_hh_l0"]
    assert all(0 < weight.abs().max() <= 5**-0.5 for weight in module.parameters())


def test_function_and_module_agree():
    module, x = sk.LiGRU(4, 5, batch_first=True, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    found = sk.functional.ligru(x, None, list(module.parameters()), batch_first=True)
    for ours, expected in zip(found, module(x), strict=True):
        assert torch.equal(ours, expected)


def test_compiled_code_gives_the_same():
    module, x = sk.LiGRU(4, 5), torch.randn(7, 3, 4)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="proj_size"):
        sk.LiGRU(4, 5, proj_size=2)
    with pytest.raises(ValueError, match="LiGRU: Expected input to be 2D or 3D"):
        sk.LiGRU(4, 5)(torch.zeros(4))
    module = sk.LiGRU(4, 5)
    module.backend = "cudnn"
    with pytest.raises(ValueError, match=r"cuDNN|tensors are on"):
        module(torch.zeros(7, 3, 4))


def test_swapping_leaves_it_alone_and_explain_knows_it():
    model = nn.Sequential(sk.LiGRU(4, 5))
    assert not sk.swap_out(model).swapped and isinstance(model[0], sk.LiGRU)
    assert sk.explain(model[0], torch.randn(7, 3, 4)).backend
