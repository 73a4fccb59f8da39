"""The short way of cells on a CPU: the long way's results, gradients and errors, and nothing that it cannot do."""

import gc
import weakref

import pytest
import torch
from operators import NO_CPU_KERNELS
from short_calls import AS_THEY_LIE, Functions, Operations, assert_same, counted, freed
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqkernels as sk
from seqkernels import plain_calls
from seqkernels.backends import autocast

pytestmark = pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=str(NO_CPU_KERNELS))
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]
TRAINED = pytest.mark.parametrize("gradients", [True, False], ids=["train", "infer"])


def cell_of(name: str, **options):
    torch.manual_seed(0)
    return getattr(sk, name)(4, 6, **options)


def states_of(name: str, *sizes: int, **options):
    states = torch.randn(*sizes, 6, **options), torch.randn(*sizes, 6, **options)
    return states if name == "LSTMCell" else states[0]


@pytest.fixture
def long_calls(monkeypatch) -> list:
    return counted(monkeypatch, "recurrent_cell")


@pytest.fixture
def by_the_long_way(monkeypatch):
    def run(function):
        with monkeypatch.context() as patched:
            patched.setattr(plain_calls, "run_cell", lambda *_: None)
            return function()

    return run


def outcome(cell, x, hx=None):
    """Results and gradients, or the error of a call."""
    cell.zero_grad()
    given = [x, *(hx if isinstance(hx, tuple) else (hx,))]
    inputs = [t.detach() if torch.is_tensor(t) else t for t in given]
    wanted = torch.is_grad_enabled() and all(t is None or (torch.is_tensor(t) and t.is_floating_point()) for t in given)
    inputs = [t.requires_grad_() for t in inputs if t is not None] if wanted else inputs
    try:
        found = cell(inputs[0], tuple(inputs[1:]) if isinstance(hx, tuple) else inputs[1] if inputs[1:] else None)
    except Exception as error:
        return type(error), str(error)
    found = found if isinstance(found, tuple) else (found,)
    strides = [t.stride() for t in found]
    if wanted:
        sum(t.float().square().sum() for t in found).backward()
        found = *found, *(t.grad for t in inputs), *(p.grad for p in cell.parameters())
    return [t.detach().clone() for t in found], strides


@TRAINED
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_results_are_the_long_ways(name, options, gradients, long_calls, by_the_long_way):
    cell, dtype = cell_of(name, **options), {"dtype": options.get("dtype")}
    for sizes in ((), (3,), (20,)):
        x = torch.randn(*sizes, 4, **dtype)
        for hx in (None, states_of(name, *sizes, **dtype)):
            with torch.set_grad_enabled(gradients):
                short = outcome(cell, x, hx)
                assert not long_calls
                assert_same(short, by_the_long_way(lambda: outcome(cell, x, hx)))  # noqa: B023
                assert long_calls.pop() and not long_calls


WRONG = {
    "features": lambda x, h: (x[..., :3], h),
    "dimensions": lambda x, h: (x[None], h),
    "dimensions of hx": lambda x, h: (x, h[None]),
    "one without a batch": lambda x, h: (x, h[0]),
    "no batch of hx's": lambda x, h: (x[0], h),
    "sequences": lambda x, h: (x[:2], h),
    "units": lambda x, h: (x, h[:, :5]),
    "dtype": lambda x, h: (x.double(), h),
    "dtype of hx": lambda x, h: (x, h.double()),
    "integers": lambda x, h: (x.long(), h),
    "device": lambda x, h: (x.to("meta"), h),
    "device of hx": lambda x, h: (x, h.to("meta")),
    "a list": lambda x, h: ([0.0], h),
    "number as hx": lambda x, h: (x, 5),
    "nested": lambda x, h: (torch.nested.nested_tensor([x[0], x[1]], layout=torch.strided), h),
    "freed": lambda x, h: (freed(x), h),
}


@TRAINED
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell"])
def test_errors_are_the_long_ways(name, wrong, gradients, by_the_long_way):
    cell, x, h = cell_of(name), torch.randn(3, 4), torch.randn(3, 6)

    def found():
        given, state = WRONG[wrong](x.clone(), h)
        with torch.set_grad_enabled(gradients):
            return outcome(cell, given, (state, h) if name == "LSTMCell" else state)

    short = found()
    assert isinstance(short[0], type)
    assert_same(short, by_the_long_way(found))


@pytest.mark.parametrize("name", CELLS)
def test_no_sequences(name, by_the_long_way):
    cell, x = cell_of(name), torch.randn(0, 4)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert_same(outcome(cell, x), by_the_long_way(lambda: outcome(cell, x)))


@pytest.mark.parametrize("lies", AS_THEY_LIE)
def test_inputs_are_taken_as_they_lie(lies):
    cell, x = cell_of("LSTMCell"), AS_THEY_LIE[lies](torch.randn(5, 3, 4))[0]
    plain = x.clone(memory_format=torch.contiguous_format)
    hx = torch.randn(6, 3).t(), torch.randn(1, 6).expand(3, 6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            short, expected = cell(x, hx), cell(plain, tuple(state.contiguous() for state in hx))
            assert all(map(torch.equal, short, expected))


@TRAINED
@pytest.mark.parametrize("mode", [Functions, Operations, torch.profiler.profile])
def test_modes_and_profilers_see_the_operator(mode, gradients):
    cell, x = cell_of("GRUCell"), torch.randn(3, 4)
    with torch.set_grad_enabled(gradients):
        unseen = cell(x)
        with mode() as watching:
            seen = cell(x)
    names = watching.seen if mode is not torch.profiler.profile else [event.name for event in watching.events()]
    assert any("seqkernels" in name and "recurrence_forward" in name for name in names)
    assert torch.equal(unseen, seen)


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("mode", [Operations, torch.profiler.profile])
@pytest.mark.parametrize("name", CELLS)
def test_a_checkpoint_may_be_repeated_under_a_mode(name, mode, region):
    cell, x = cell_of(name), torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=region):
        expected = torch.autograd.grad(cell(x)[0].sum(), x)[0]
        y = checkpoint(cell, x, use_reentrant=False)
    with mode():
        assert torch.equal(torch.autograd.grad(y[0].sum(), x)[0], expected)


@pytest.mark.parametrize("name", CELLS)
def test_outputs_may_be_changed_in_place(name):
    cell, x = cell_of(name), torch.randn(3, 4, requires_grad=True)
    results = lambda: torch.utils._pytree.tree_leaves(cell(x))  # noqa: E731
    expected = torch.autograd.grad(sum((t * 2 + 1).sum() for t in results()), x)[0]
    changed = results()
    for t in changed:
        t *= 2
        t += 1
    assert torch.equal(torch.autograd.grad(sum(t.sum() for t in changed), x)[0], expected)


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives_are_the_long_ways(name, region, by_the_long_way):
    cell, x, hx = cell_of(name), torch.randn(3, 4, requires_grad=True), states_of(name, 3, requires_grad=True)
    inputs = x, *(hx if isinstance(hx, tuple) else (hx,)), *cell.parameters()

    def derivatives():
        with torch.autocast("cpu", torch.bfloat16, enabled=region):
            y = torch.utils._pytree.tree_leaves(cell(x, hx))
        first = torch.autograd.grad(sum(t.float().square().sum() for t in y), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    found, expected = derivatives(), by_the_long_way(derivatives)
    assert all(one.dtype == torch.float32 for one in found)
    torch.testing.assert_close(found, expected, **({"atol": 0.05, "rtol": 0.05} if region else {}))


def test_weights_that_change_under_autocast_leave_the_derivatives_of_their_casts():
    x, found = torch.randn(3, 4, requires_grad=True), []
    for cell in (cell_of("GRUCell"), nn.GRUCell(4, 6)):
        cell.load_state_dict(cell_of("GRUCell").state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            y = cell(x)
        with torch.no_grad():
            cell.weight_ih += 1
        first = torch.autograd.grad(y.float().sum(), x, create_graph=True)[0]
        found.append(torch.stack([first, torch.autograd.grad(first.square().sum(), x)[0]]))
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)


def test_a_checkpoint_under_autocast_keeps_nothing_within():
    linear, cell, within = nn.Linear(4, 4), cell_of("GRUCell"), []

    def block(x):
        given = linear(x).float()
        within.append(weakref.ref(given))
        return cell(given)

    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(block, torch.randn(3, 4, requires_grad=True), use_reentrant=False)
    gc.collect()
    assert within[0]() is None
    y.float().sum().backward()


@TRAINED
@pytest.mark.parametrize("name", CELLS)
def test_autocast_goes_the_short_way(name, gradients, long_calls, by_the_long_way):
    cell, x, hx = cell_of(name), torch.randn(3, 4), states_of(name, 3)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        short = outcome(cell, x, hx)
        assert not long_calls and torch.is_autocast_enabled("cpu")
        assert_same(short, by_the_long_way(lambda: outcome(cell, x, hx)))
        kept = dict(autocast._Region.casts)
        assert len(kept) == 2
        outcome(cell, x, hx)
        assert all(autocast._Region.casts[key][1] is cast for key, (_, cast) in kept.items())
    assert not autocast._Region.casts


def test_in_inference_mode_large_weights_alone_are_cast_once():
    cell = sk.RNNCell(4, 1024)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = cell(torch.randn(1, 4))
        (weight, cast), *more = autocast._Region.casts.values()
        assert y.dtype == cast.dtype == torch.bfloat16 and weight is cell.weight_hh and not more


def test_transforms_and_forward_derivatives_go_the_long_way(long_calls):
    cell, x = cell_of("GRUCell"), torch.randn(3, 4)
    expected = cell(x)
    assert torch.equal(torch.vmap(cell)(x), expected)
    torch.func.grad(lambda x: cell(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        cell(torch.autograd.forward_ad.make_dual(x, x))
    assert len(long_calls) >= 3
