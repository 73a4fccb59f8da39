"""Other people's models, swapped: `make test-models` runs these, in an environment that has their packages."""

import copy
import importlib
import os
import pickle

import pytest
import torch

import seqkernels as sk
from benchmarks import zoo
from benchmarks.zoo import ZOO

if not os.environ.get("SEQKERNELS_TEST_MODELS"):
    pytest.skip("`make test-models` runs these", allow_module_level=True)

STEPS = 5


@pytest.fixture(params=ZOO)
def entry(request):
    entry = ZOO[request.param]
    try:
        importlib.import_module(entry.package)
    except ImportError as error:
        pytest.skip(f"{entry.package}: {error}")
    return entry


@pytest.fixture
def made(entry):
    """The model as its package makes it, the same one with everything swapped, and what calls them."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(entry.dtype)
    torch.manual_seed(0)
    model, call = entry.build()
    model.eval()
    swapped = copy.deepcopy(model)
    report = sk.swap_in(swapped, cells=True)
    assert len(report.swapped) == entry.swapped and not report.left, report
    yield model, swapped, call
    torch.set_default_dtype(dtype)


def outputs(model, call):
    torch.manual_seed(1)  # of dropout
    found = zoo.outputs(call(model))
    assert found and all(y.isfinite().all() for y in found)
    return found


def same_bits(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(model, call):
    """The losses of some steps."""
    optimizer, losses = torch.optim.SGD(model.train().parameters(), 0.01), []
    for _ in range(STEPS):
        loss = zoo.loss_of(outputs(model, call))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_outputs_agree_and_swapping_out_is_exact(made):
    model, swapped, call = made
    expected = outputs(model, call)
    torch.testing.assert_close(outputs(swapped, call), expected)
    sk.swap_out(swapped)
    assert same_bits(outputs(swapped, call), expected)


def test_training_steps_agree(made):
    model, swapped, call = made
    before = copy.deepcopy(model).state_dict()
    torch.testing.assert_close(train(swapped, call), train(model, call))
    trained = dict(model.named_parameters())
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
    torch.testing.assert_close(dict(swapped.named_parameters()), trained)


def test_state_dicts_load_both_ways(made):
    model, swapped, call = made
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.mul_(0.9)
    model.load_state_dict(swapped.state_dict())
    torch.testing.assert_close(outputs(model, call), outputs(swapped, call))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    swapped.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(swapped, call), outputs(model, call))


def test_pickle_gives_the_same_model(made):
    model, swapped, call = made
    try:
        pickle.dumps(model)
    except RuntimeError as error:  # torch refuses parametrizations
        pytest.skip(f"as its package makes it: {error}")
    assert same_bits(outputs(pickle.loads(pickle.dumps(swapped)), call), outputs(swapped, call))


def test_what_is_torchscript_is_left_and_said():
    model = pytest.importorskip("silero_vad").load_silero_vad()
    report = sk.swap_in(model, cells=True)
    assert len(report.left) == 2 and not report.swapped
    assert {swap.reason for swap in report} == {"TorchScript has its code"}
