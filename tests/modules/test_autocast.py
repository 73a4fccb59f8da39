"""Weights under autocast: cast once in a region, as torch's own operations have it."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqkernels as sk

MODULES = [sk.LSTMCell, sk.GRU]
SIZES = 24, 32  # no other tensor of a call has a weight's shape


def casts_of_weights(module, x) -> int:
    """How many matrices a call casts."""
    shapes = [list(p.shape) for p in module.parameters() if p.dim() == 2]
    with torch.profiler.profile(record_shapes=True) as profile:
        module(x)
    return sum(event.name == "aten::_to_copy" and event.input_shapes[0] in shapes for event in profile.events())


def gradients_of(module, x, calls: int = 1) -> list:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [torch.utils._pytree.tree_leaves(module(x))[0].float().sum() for _ in range(calls)]
    return torch.autograd.grad(sum(outputs), list(module.parameters()))


@pytest.mark.parametrize("make", MODULES)
def test_a_weight_is_cast_once_in_a_region(make):
    module, x = make(*SIZES), torch.randn(3, SIZES[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert [casts_of_weights(module, x) for _ in range(3)] == [2, 0, 0]
        with torch.autocast("cpu", torch.bfloat16):  # the same region goes on
            assert casts_of_weights(module, x) == 0
        torch.clear_autocast_cache()
        assert casts_of_weights(module, x) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert casts_of_weights(module, x) == 2
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert [casts_of_weights(module, x) for _ in range(2)] == [2, 2]
    module.requires_grad_(False)  # torch casts these in every call
    with torch.autocast("cpu", torch.bfloat16):
        assert [casts_of_weights(module, x) for _ in range(2)] == [2, 2]


def test_the_cast_is_that_of_torchs_own_operations():
    cell, x = sk.GRUCell(*SIZES), torch.randn(3, SIZES[0])
    with torch.autocast("cpu", torch.bfloat16):
        for weight in (cell.weight_ih, cell.weight_hh):
            nn.functional.linear(torch.randn(3, weight.shape[1]), weight)
        assert casts_of_weights(cell, x) == 0


@pytest.mark.parametrize("edit", ["in place", "data"])
def test_a_weight_edited_within_a_region_counts_from_the_next_region_on_as_in_torch(edit):
    ours, x = sk.GRUCell(*SIZES), torch.randn(3, SIZES[0])
    theirs = nn.GRUCell(*SIZES)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            before = module(x)
            with torch.no_grad():
                for weight in (module.weight_ih, module.weight_hh):
                    (weight.data if edit == "data" else weight).mul_(-3)
            within = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            after = module(x)
        assert torch.equal(before, within) and not torch.allclose(before, after, atol=0.1)
        results.append(after.float())
    torch.testing.assert_close(*results, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell"])
def test_gradients_flow_through_a_cast_that_several_calls_share(name):
    ours, theirs, x = getattr(sk, name)(*SIZES), getattr(nn, name)(*SIZES), torch.randn(3, SIZES[0])
    theirs.load_state_dict(ours.state_dict())
    for one, other in zip(gradients_of(ours, x, 3), gradients_of(theirs, x, 3), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 2 * torch.finfo(torch.bfloat16).eps * other.norm()


# Before torch 2.13, torch's own operations leave what nobody can differentiate after inference_mode.
@pytest.mark.parametrize(
    ("mode", "first"), [(torch.no_grad, "ours"), (torch.no_grad, "torch's"), (torch.inference_mode, "ours")]
)
def test_gradients_flow_after_a_call_that_wanted_none(mode, first):
    module, x = sk.GRU(*SIZES), torch.randn(3, SIZES[0])
    expected = gradients_of(copy.deepcopy(module), x)
    with torch.autocast("cpu", torch.bfloat16):
        with mode():
            for weight in (module.weight_ih_l0, module.weight_hh_l0) if first == "torch's" else ():
                nn.functional.linear(torch.randn(3, weight.shape[1]), weight)
            module(x)
        torch.testing.assert_close(gradients_of(module, x), expected)


def test_hooks_on_saved_tensors_see_none_of_it():
    module, x = sk.GRU(*SIZES), torch.randn(3, SIZES[0], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        checkpoint(lambda x: module(x)[0].float().sum(), x, use_reentrant=False).backward()
    checkpointed = [p.grad for p in module.parameters()]
    torch.testing.assert_close(list(gradients_of(module, x)), checkpointed)


@pytest.mark.parametrize("options", [{"zoneout": 0.3}, {"layer_norm": True}], ids=str)
def test_a_backward_pass_inside_of_a_region_is_none_of_its(options, backend):
    """Of what was computed outside of it."""
    if backend == "torch_eager":
        pytest.skip("its products are torch's own")
    layer, x = sk.GRU(4, 5, **options), torch.randn(7, 3, 4)
    layer.backend = backend
    try:
        loss = layer(x)[0].square().sum()
    except ValueError as refused:
        pytest.skip(str(refused))
    expected = torch.autograd.grad(loss, layer.weight_hh_l0, retain_graph=True)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = torch.autograd.grad(loss, layer.weight_hh_l0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
