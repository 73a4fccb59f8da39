"""Every public attribute and method of torch.nn's six classes exists on ours and does what it does there."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import seqkernels as sk

LAYERS = ("RNN", "GRU", "LSTM")
NAMES = (*LAYERS, "RNNCell", "GRUCell", "LSTMCell")


def pair(name, **options):
    """torch.nn's module and ours, with the same weights."""
    torchs, ours = getattr(nn, name)(4, 5, **options), getattr(sk, name)(4, 5, **options)
    ours.load_state_dict(torchs.state_dict())
    return torchs, ours


@pytest.mark.parametrize("name", NAMES)
def test_nothing_public_is_missing(name):
    torchs, ours = pair(name)
    public = {key for key in dir(torchs) if not key.startswith("_")}
    assert not public - set(dir(ours))
    values = {key: value for key, value in vars(torchs).items() if not key.startswith("_")}
    assert {key: getattr(ours, key) for key in values} == values
    assert getattr(torchs, "__constants__", None) == getattr(ours, "__constants__", None)
    for key in public:
        assert callable(getattr(ours, key)) == callable(getattr(torchs, key)), key


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_checks_of_arguments_say_what_torchs_say(name, batch_first):
    torchs, ours = pair(name, batch_first=batch_first)
    x, state = torch.randn(6, 3, 4), torch.zeros(1, 6 if batch_first else 3, 5)
    hidden = (state, state) if name == "LSTM" else state
    assert ours.get_expected_hidden_size(x, None) == torchs.get_expected_hidden_size(x, None)
    if name == "LSTM":
        assert ours.get_expected_cell_size(x, None) == torchs.get_expected_cell_size(x, None)
    ours.check_forward_args(x, hidden, None)
    wrong = (state, state[:, :1]) if name == "LSTM" else state[:, :1]
    with pytest.raises(RuntimeError) as expected:
        torchs.check_forward_args(x, wrong, None)
    with pytest.raises(RuntimeError) as found:
        ours.check_forward_args(x, wrong, None)
    assert str(found.value) == str(expected.value)
    order = torch.tensor([2, 0, 1])
    state = torch.randn(1, 3, 5)
    hidden = (state, state + 1) if name == "LSTM" else state
    torch.testing.assert_close(ours.permute_hidden(hidden, order), torchs.permute_hidden(hidden, order))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_put_into_flat_weights_is_used(name, options):
    """As hypernetworks, higher and mixins for recurrent dropout do: one item, or the whole list."""
    torchs, ours = pair(name, **options)
    x = torch.randn(6, 3, 4)
    other = torch.randn_like(ours.weight_hh_l0, requires_grad=True)
    for module in (torchs, ours):
        module._flat_weights[1] = other
    torch.testing.assert_close(ours(x)[0], torchs(x)[0])
    ours(x)[0].sum().backward()
    assert other.grad.any() and ours.weight_hh_l0.grad is None
    fast = [torch.randn_like(weight) for weight in ours.parameters()]
    for module in (torchs, ours):
        module._flat_weights = list(fast)
    torch.testing.assert_close(ours(x)[0], torchs(x)[0])
    assert all(a is b for a, b in zip(ours._flat_weights, fast, strict=True))
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(twin(x)[0], ours(x)[0])
    replica = ours._replicate_for_data_parallel()
    torch.testing.assert_close(replica(x)[0], ours(x)[0])
    for module in (torchs, ours):  # an assignment to the parameter's own name is the newer one
        module.weight_ih_l0 = nn.Parameter(torch.ones_like(module.weight_ih_l0))
    torch.testing.assert_close(ours(x)[0], torchs(x)[0])
    for module in (torchs, ours):  # and what moves a module puts its parameters back
        module.double().float()
    torch.testing.assert_close(ours(x)[0], torchs(x)[0])


def test_flat_weights_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"_flat_weights are weight_ih_l0, .* got 1 weights"):
        sk.GRU(4, 5)._flat_weights = [torch.zeros(3)]


@pytest.mark.parametrize(
    "change",
    [
        lambda flat: flat.pop(),
        lambda flat: flat.append(flat[0]),
        lambda flat: flat.insert(0, flat[0]),
        lambda flat: flat.extend(flat[:]),
        lambda flat: flat.clear(),
        lambda flat: flat.reverse(),
        lambda flat: flat.__delitem__(0),
    ],
)
def test_no_change_of_flat_weights_is_silently_lost(change):
    with pytest.raises(TypeError, match="assign a whole list"):
        change(sk.GRU(4, 5)._flat_weights)


def test_some_flat_weights_are_replaced_by_a_slice():
    torchs, ours = pair("LSTM")
    x, other = torch.randn(6, 3, 4), [torch.randn(20, 4), torch.randn(20, 5)]
    for module in (torchs, ours):
        module._flat_weights[:2] = other
    torch.testing.assert_close(ours(x)[0], torchs(x)[0])


def test_flat_weights_are_a_list_to_what_goes_through_nested_lists():
    ours = sk.GRU(4, 5)
    leaves, structure = pytree.tree_flatten([ours._flat_weights])
    assert [id(leaf) for leaf in leaves] == [id(parameter) for parameter in ours.parameters()]
    assert type(pytree.tree_unflatten(leaves, structure)[0]) is list


@pytest.mark.parametrize("name", LAYERS)
def test_flat_weights_go_along_when_modules_are_swapped(name):
    module, x = getattr(nn, name)(4, 5), torch.randn(6, 3, 4)
    module._flat_weights[0] = torch.randn_like(module.weight_ih_l0)
    expected = module(x)[0]
    sk.swap_in(module)
    torch.testing.assert_close(module(x)[0], expected)
    sk.swap_out(module)
    torch.testing.assert_close(module(x)[0], expected)
