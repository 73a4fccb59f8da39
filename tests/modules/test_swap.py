"""Swapping torch.nn's modules for ours and back, patching torch.nn, and explaining."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import seqkernels as sk

NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")


class Tagger(nn.Module):
    """A model of somebody else's: nested, with one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(4, 5, 2, dropout=0.5, bidirectional=True, batch_first=True)})
        self.shared = nn.GRU(10, 10, batch_first=True)
        self.again = self.shared
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.encoder["lstm"](self.embedding(tokens))[0]
        return self.head(self.again(self.shared(y)[0])[0])


def test_a_model_swapped_in_keeps_everything_and_gives_the_same():
    model, tokens = Tagger().eval(), torch.randint(10, (3, 7))
    model.encoder["lstm"].train()
    parameters, state = list(model.parameters()), list(model.state_dict())
    calls = []
    model.shared.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    expected = model(tokens)
    report = sk.swap_in(model)
    assert [(s.name, s.before, s.after) for s in report] == [
        ("encoder.lstm", "torch.LSTM", "seqkernels.LSTM"),
        ("shared", "torch.GRU", "seqkernels.GRU"),
    ]
    assert "2 swapped, 0 left" in str(report) and "encoder.lstm: torch.LSTM -> seqkernels.LSTM" in str(report)
    assert type(model.shared) is sk.GRU and model.again is model.shared
    assert model.encoder["lstm"].training and model.encoder["lstm"].dropout == 0.5 and not model.shared.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens), expected)
    assert len(calls) == 4
    assert not sk.swap_in(model)
    assert len(sk.swap_out(model)) == 2
    assert type(model.shared) is nn.GRU
    torch.manual_seed(0)
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself_can_be_the_module(name):
    module, x = getattr(nn, name)(4, 5), torch.randn(3, 4)
    expected = module(x)
    assert sk.swap_in(module)[0].name == "" and type(module) is getattr(sk, name)
    torch.testing.assert_close(module(x), expected)
    sk.swap_out(module)
    assert type(module) is getattr(nn, name)
    torch.testing.assert_close(module(x), expected)


def test_an_optimizer_made_before_goes_on():
    model = nn.GRU(4, 5)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sk.swap_in(model)
    x = torch.randn(6, 3, 4)
    before = model(x)[0]
    before.sum().backward()
    optimizer.step()
    assert not torch.equal(model(x)[0], before)
    sk.swap_out(model)
    torch.testing.assert_close(model(x)[0], copy.deepcopy(model)(x)[0])


def test_a_parametrized_module_is_swapped_with_its_parametrization():
    model, x = nn.Sequential(nn.GRU(4, 5)), torch.randn(6, 3, 4)
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    expected = model(x)[0]
    assert sk.swap_in(model)[0].after == "seqkernels.ParametrizedGRU"
    assert isinstance(model[0], sk.GRU)
    torch.testing.assert_close(model(x)[0], expected)
    torch.testing.assert_close(copy.deepcopy(model)(x)[0], expected)
    sk.swap_out(model)
    assert isinstance(model[0], nn.GRU)
    torch.testing.assert_close(model(x)[0], expected)


def test_a_subclass_is_left_and_reported():
    class Mine(nn.GRU):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    model = nn.Sequential(Mine(4, 5))
    report = sk.swap_in(model)
    assert type(model[0]) is Mine and not report.swapped
    assert "Mine left: a subclass may compute something else" in str(report)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_with_another_forward_is_left_both_ways(name):
    """As accelerate's hooks and profilers do: they keep the old forward and put their own into the instance."""
    module, x = getattr(nn, name)(4, 5), torch.randn(3, 4)
    before = module.forward
    module.forward = lambda *args: before(*args)
    expected = module(x)
    report = sk.swap_in(module)
    assert type(module) is getattr(nn, name) and "left: its forward was replaced" in str(report)
    torch.testing.assert_close(module(x), expected)
    del module.forward
    sk.swap_in(module)
    ours = module.forward
    module.forward = lambda *args: ours(*args)
    assert not sk.swap_out(module).swapped and type(module) is getattr(sk, name)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    "dtype, reason",
    [(torch.complex64, "complex64 is no floating dtype"), (torch.float8_e4m3fn, "torch computes nothing in")],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_no_backend_runs_is_left_with_the_reason(name, dtype, reason):
    model = nn.ModuleList([getattr(nn, name)(4, 5), getattr(nn, name)(4, 5)])
    for key, parameter in list(model[0].named_parameters()):
        setattr(model[0], key, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    report = sk.swap_in(model)
    assert [swap.name for swap in report.left] == ["0"] and reason in report[0].reason
    assert type(model[0]) is getattr(nn, name) and type(model[1]) is getattr(sk, name)


def test_a_swapped_model_is_saved_and_loaded_whole(tmp_path):
    model, tokens = Tagger().eval(), torch.randint(10, (3, 7))
    old = pickle.dumps(model)
    expected = model(tokens)
    sk.swap_in(model)
    torch.save(model, tmp_path / "model.pt")
    twins = [torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))]
    twins += [copy.deepcopy(model), pickle.loads(old)]
    assert len(sk.swap_in(twins[-1])) == 2
    for twin in twins:
        assert type(twin.shared) is sk.GRU and twin.again is twin.shared
        torch.testing.assert_close(twin(tokens), expected)
        sk.swap_out(twin)
        torch.testing.assert_close(pickle.loads(pickle.dumps(twin))(tokens), expected)


def test_a_swapped_model_goes_to_a_spawned_process():
    model, x = nn.GRU(4, 5).requires_grad_(False), torch.randn(6, 3, 4)
    sk.swap_in(model)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.testing.assert_close(pool.apply(model, (x,))[0], model(x)[0])


def test_patch_torch_leaves_earlier_models_what_they_were():
    earlier, x = nn.LSTM(4, 5), torch.randn(6, 3, 4)
    with sk.patch_torch():
        twin = pickle.loads(pickle.dumps(earlier))
        torch.testing.assert_close(twin(x)[0], earlier(x)[0])
        ours = nn.LSTM(4, 5)
        assert isinstance(earlier, nn.LSTM) and isinstance(ours, nn.LSTM) and not isinstance(earlier, nn.GRU)
        assert issubclass(type(earlier), nn.LSTM) and issubclass(sk.LSTM, nn.LSTM)
        assert not issubclass(type(earlier), nn.GRU)
        assert type(pickle.loads(pickle.dumps(ours))) is sk.LSTM

        class Own(nn.LSTM):
            pass

        assert not isinstance(earlier, Own) and isinstance(Own(4, 5), nn.LSTM)
    assert isinstance(earlier, nn.LSTM) and not isinstance(ours, nn.LSTM) and not isinstance(earlier, sk.LSTM)
    assert not issubclass(type(earlier), sk.LSTM)


def test_patch_torch_gives_ours_to_code_that_says_torch_nn():
    with sk.patch_torch():
        for name in NAMES:
            assert getattr(nn, name) is getattr(sk, name)
            assert getattr(nn.modules.rnn, name).__module__ == "torch.nn.modules.rnn"
        with sk.patch_torch():
            model = Tagger()
        assert nn.GRU is sk.GRU
    assert all(getattr(nn, name).__module__ == "torch.nn.modules.rnn" for name in NAMES)
    assert type(model.shared) is sk.GRU and model(torch.randint(10, (3, 7))).shape == (3, 7, 3)
    with pytest.raises(KeyError), sk.patch_torch():
        raise KeyError
    assert nn.GRU is not sk.GRU


def test_explain_says_what_runs_and_why():
    x = torch.randn(6, 3, 4)
    for module in (sk.GRU(4, 5), nn.LSTM(4, 5), sk.RNNCell(4, 5), nn.GRUCell(4, 5), nn.RNN(4, 5)):
        plan = sk.explain(module, x)
        assert plan.backend in ("cpu", "torch_eager") and plan.reason in str(plan)
    meta = str(sk.explain(sk.GRU(4, 5, device="meta"), x.to("meta")))
    assert "not cpu: the tensors are on meta" in meta
    forced = sk.GRU(4, 5)
    forced.backend = "torch_eager"
    assert str(sk.explain(forced, x)) == "torch_eager: forced"
    with pytest.raises(TypeError, match="got Linear"):
        sk.explain(nn.Linear(4, 5), x)
