"""Swapping torch.nn's modules for ours and back, patching torch.nn, and explaining."""

import abc
import copy
import multiprocessing
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import seqkernels as sk
from seqkernels import trial
from seqkernels.drop_in import DropIn

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


@pytest.fixture
def dropout_of_torch():
    """cuDNN drops by a generator of its own, whose draws nobody else has; without it torch.nn drops as we do. (This
    setting allows TF32 where nobody says that it does not.)"""
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        yield


def test_a_model_swapped_in_keeps_everything_and_gives_the_same(dropout_of_torch):
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
    assert not sk.swap_in(model).swapped
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
        here = {"cpu", "torch_eager"} if x.device.type == "cpu" else {"cuda", "triton", "cudnn", "torch_eager"}
        assert plan.backend in here and plan.reason in str(plan)
    meta = str(sk.explain(sk.GRU(4, 5, device="meta"), x.to("meta")))
    assert "not cpu: the tensors are on meta" in meta
    forced = sk.GRU(4, 5)
    forced.backend = "torch_eager"
    assert str(sk.explain(forced, x)) == "torch_eager: forced"
    with pytest.raises(TypeError, match="got Linear"):
        sk.explain(nn.Linear(4, 5), x)


@pytest.mark.parametrize("model", [nn.GRU, None, [nn.GRU(4, 5)]])
def test_what_is_no_model_is_refused(model):
    for function in (sk.swap_in, sk.swap_out):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a model, which is one torch.nn.Module, got "):
            function(model)
    with pytest.raises(TypeError, match="explain takes a module, got "):
        sk.explain(model)


@pytest.mark.parametrize("names", [3, [3], nn.GRU])
def test_patterns_are_strings_and_classes_are_classes(names):
    model = nn.Sequential(nn.GRU(4, 5))
    with pytest.raises(TypeError, match="names are patterns, which are strings, got "):
        sk.swap_in(model, names=names)
    with pytest.raises(ValueError, match=r"classes are some of .*, got 'GRU'"):
        sk.swap_in(model, classes="GRU")
    assert type(model[0]) is nn.GRU


def test_only_what_is_asked_for_is_swapped():
    def swapped(**options):
        model = nn.ModuleDict({"encoder": Tagger(), "cell": nn.GRUCell(4, 5), "decoder": nn.RNN(4, 5)})
        report = sk.swap_in(model, **options)
        assert len(report) == 4 and all(swap.reason.endswith("was not asked for") for swap in report.left)
        assert [isinstance(type(model.get_submodule(swap.name)), DropIn) for swap in report] == [
            swap in report.swapped for swap in report
        ]
        return {swap.name for swap in report.swapped}

    everything = {"encoder.encoder.lstm", "encoder.shared", "cell", "decoder"}
    assert swapped() == everything and swapped(cells=False) == everything - {"cell"}
    assert swapped(classes=nn.LSTM) == {"encoder.encoder.lstm"}
    assert swapped(classes=[nn.RNN, nn.GRUCell]) == {"cell", "decoder"}
    assert swapped(names="encoder.*") == {"encoder.encoder.lstm", "encoder.shared"}
    assert swapped(names=["d*", "cell"], cells=False) == {"decoder"} and not swapped(names="no such name")
    for classes in (sk.GRU, [nn.GRU, nn.Linear], "GRU"):
        with pytest.raises(ValueError, match=r"classes are some of torch\.nn's RNN, GRU, LSTM, RNNCell"):
            swapped(classes=classes)


def test_a_swap_that_does_not_pay_is_not_made_without_a_word():
    """Cells on a CPU, by the rows of benchmarks/results/models.jsonl."""
    model = nn.ModuleDict({"cell": nn.LSTMCell(4, 5), "layer": nn.LSTM(4, 5)}).to("cpu")
    with pytest.warns(UserWarning, match="a loop of torch.nn's cells is mostly .* 'cell' became; cells=False leaves"):
        assert len(sk.swap_in(model).swapped) == 2
    sk.swap_out(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for asked in ({"cells": True}, {"cells": False}, {"classes": [nn.LSTMCell, nn.LSTM]}, {"names": "layer"}):
            assert sk.swap_in(model, **asked).swapped
            sk.swap_out(model)
        sk.swap_in(nn.GRUCell(4, 5, device="meta"))


def test_a_report_never_says_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert str(sk.swap_in(model)) == "0 swapped, 0 left: no RNN, GRU, LSTM or cell among 3 modules"
    kinds = nn.ModuleDict(
        {
            "ours": sk.GRU(4, 5),
            "ligru": sk.LiGRU(4, 5),
            "script": torch.jit.script(nn.Sequential(nn.GRU(4, 5))),
            "quantized": torch.ao.nn.quantizable.LSTM(4, 5),
            "base": nn.RNNBase("GRU", 4, 5),
        }
    )
    assert {swap.name: swap.reason for swap in sk.swap_in(kinds)} == {
        "ours": "it is ours already",
        "ligru": "it is ours already",
        "script.0": "TorchScript has its code",
        "quantized": "it is quantized, or made to be",
        "quantized.layers.0.layer_fw.cell": "it is quantized, or made to be",
        "base": "it is a class of its own",
    }
    out = {swap.name: swap.reason for swap in sk.swap_out(kinds)}
    assert out.pop("ours") == "" and out.pop("ligru") == "torch.nn has no such class" and len(out) == 4
    assert sk.swap_out(nn.GRU(4, 5))[0].reason == "it is none of ours"


class Wrapped(nn.LSTM):
    """As libraries have them: made in another way, and with a method besides."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, num_layers=2)

    def last(self, x):
        return self(x)[0][-1]


class Abstract(abc.ABC, nn.RNNBase):
    def first(self, x):
        return self.forward(x)[0][0]


class Concrete(Abstract, nn.GRU):
    pass


@pytest.mark.parametrize("make", [lambda: Wrapped(4), lambda: Concrete(4, 5)])
def test_a_subclass_that_changes_only_how_it_is_made_can_be_swapped(make):
    module, x = make(), torch.randn(6, 3, 4)
    cls, method = type(module), "last" if isinstance(module, Wrapped) else "first"
    expected, state, text = module(x)[0], list(module.state_dict()), repr(module)
    assert "; subclasses=True swaps it" in str(sk.swap_in(module)) and type(module) is cls
    assert f"as {cls.__module__.split('.')[0]}.{cls.__name__}" in str(sk.swap_in(module, subclasses=True))
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(twin, cls) and isinstance(twin, nn.RNNBase) and type(twin).forward is sk.GRU.forward
        torch.testing.assert_close(twin(x)[0], expected)
        torch.testing.assert_close(getattr(twin, method)(x), expected[-1 if method == "last" else 0])
        assert list(twin.state_dict()) == state and repr(twin) == text
        assert sk.swap_in(twin, subclasses=True)[0].reason == "it is ours already"
        assert sk.swap_out(twin).swapped and type(twin) is cls
        torch.testing.assert_close(twin(x)[0], expected)


class Stepping(nn.GRU):
    def step(self, x):
        return self(x[None])[0][0]


def test_a_step_of_a_subclass_stays_its_own():
    module, x = Stepping(4, 5), torch.randn(3, 4)
    expected = module.step(x)
    assert sk.swap_in(module, subclasses=True).swapped and type(module).step is Stepping.step
    torch.testing.assert_close(module.step(x), expected)


@pytest.mark.parametrize("method", ["forward", "check_input", "_weights"])
def test_a_subclass_with_code_of_its_own_is_left_even_if_asked_for(method):
    own = type("Own", (nn.GRU,), {method: lambda self, *args: None})
    report = sk.swap_in(own(4, 5), subclasses=True)
    assert f"its {method} is its own" in str(report) and not report.swapped


def test_patch_torch_reports_what_was_built():
    from torch.nn import GRU

    with sk.patch_torch() as built:
        nn.LSTM(4, 5), nn.LSTM(4, 5), nn.RNNCell(4, 5), GRU(4, 5)
    assert built.ours == {"LSTM": 2, "RNNCell": 1} and built.torchs == {"GRU": 1}
    first, second = str(built).splitlines()
    assert first == "built with seqkernels: 2 LSTM, 1 RNNCell"
    assert second.startswith("built with torch.nn: 1 GRU; ") and "swap_in(model)" in second
    nn.LSTM(4, 5)
    assert built.ours["LSTM"] == 2


def test_patch_torch_warns_where_it_did_nothing():
    from torch.nn import GRU

    with pytest.warns(UserWarning, match=r"1 GRU of torch\.nn; .* use swap_in") as caught, sk.patch_torch():
        GRU(4, 5)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="nothing was built with seqkernels, and nothing of torch"), sk.patch_torch():
        pass
    with pytest.warns(UserWarning, match=r"patch_torch\(\) does nothing by itself") as caught:
        sk.patch_torch()
    assert caught[0].filename == __file__

    @sk.patch_torch()
    def build():
        return nn.GRU(4, 5)

    assert type(build()) is sk.GRU and type(build()) is sk.GRU and type(nn.GRU(4, 5)) is not sk.GRU


def test_patch_torch_takes_no_arguments_and_says_so_once(monkeypatch):
    errors_of_del = []
    monkeypatch.setattr(sys, "unraisablehook", errors_of_del.append)
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        sk.patch_torch(nn)
    assert not errors_of_del


class Noisy(nn.Module):
    """Two layers and a cell, one of them not called, with dropout and running averages beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()
        self.rnn, self.cell, self.spare = sk.GRU(4, 5, bidirectional=True), nn.LSTMCell(10, 3), nn.RNN(4, 5)

    def forward(self, x):
        y, _ = self.rnn(self.dropout(self.norm(x.flatten(0, 1)).view_as(x)))
        state = None
        for step in y:
            state = self.cell(step, state)
        return state


def test_explain_of_a_model_has_a_line_for_each_recurrent_module():
    model, x = Noisy(), torch.randn(6, 3, 4)
    lines = str(sk.explain(model)).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "rnn (seqkernels.GRU)",
        "cell (torch.nn.LSTMCell)",
        "spare (torch.nn.RNN)",
    ]
    assert "not swapped in; its drop-in: " in lines[1] and lines[0].split(": ")[1] in ("cpu", "torch_eager")
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explanation = sk.explain(model, x)
    assert [(one.name, one.plan is None) for one in explanation] == [("rnn", False), ("cell", False), ("spare", True)]
    assert explanation[0].plan == sk.explain(model.rnn, x) and "not called" in str(explanation[2])
    torch.testing.assert_close(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), seed) and not model.rnn._forward_pre_hooks
    assert str(sk.explain(sk.LSTM(4, 5))).startswith("(the model itself) (seqkernels.LSTM): ")
    assert str(sk.explain(nn.Linear(4, 5))) == "no RNN, GRU, LSTM or cell in it"

    class States(nn.Sequential):
        def forward(self, x):
            return self[0](x, return_all_states=True)[2]

    assert [one.plan for one in sk.explain(States(model.rnn), x)] == [sk.explain(model.rnn, x)]
    replaced = nn.Sequential(nn.GRU(4, 5))
    replaced[0].forward = lambda x: x
    assert "its forward was replaced" in str(sk.explain(replaced))


def test_torchscript_is_refused_with_what_to_take_instead():
    for module in (sk.GRU(4, 5), sk.LSTMCell(4, 5)):
        with pytest.raises(
            RuntimeError, match=r"TorchScript has no seqkernels\.\w+: take torch.export, or .* swap_out"
        ):
            torch.jit.script(nn.Sequential(module))
    module, x = sk.GRU(4, 5), torch.randn(6, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        with pytest.raises(RuntimeError, match=r"trace under no_grad, or torch\.export"):
            torch.jit.trace(module, x)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_a_benchmark_keeps_the_faster_of_each(monkeypatch):
    """What is called, as the model calls it, and what becomes of the answer; time itself is no matter of tests."""
    model, x, asked = Noisy(), torch.randn(6, 3, 4), []
    sk.swap_out(model)
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def compare(first, second, args, kwargs):
        asked.append((type(first), type(second), torch.is_grad_enabled(), len(args)))
        torch.testing.assert_close(second.forward(*args, **kwargs), first.forward(*args, **kwargs))
        assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
        return 0.5 if isinstance(first, nn.GRU) else 2.0

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(trial, "compare", compare)
        report = sk.swap_in(model, benchmark=x)
    assert asked == [(nn.GRU, sk.GRU, False, 1), (nn.LSTMCell, sk.LSTMCell, False, 2)]
    assert [(swap.name, swap.speed, bool(swap.after)) for swap in report] == [
        ("rnn", 0.5, False),
        ("cell", 2.0, True),
        ("spare", None, False),
    ]
    assert type(model.rnn) is nn.GRU and type(model.cell) is sk.LSTMCell and type(model.spare) is nn.RNN
    assert "-> seqkernels.LSTMCell (2.00 times as fast as torch.nn's)" in str(report)
    assert report[0].reason == "it is not faster as ours" and report[2].reason == "the example does not call it"
    torch.testing.assert_close(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), seed)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_trial_times_both_and_changes_nothing(monkeypatch, gradients, packed):
    monkeypatch.setattr(trial, "SECONDS", 0)
    first, second = nn.GRU(4, 5, 2, dropout=0.5), sk.GRU(4, 5, 2, dropout=0.5)
    x = torch.randn(6, 3, 4, requires_grad=True)
    input, seed = pack_padded_sequence(2 * x, [6, 4, 1]) if packed else 2 * x, torch.get_rng_state()
    with torch.set_grad_enabled(gradients):
        assert trial.compare(first, second, (input,), {"hx": torch.zeros(2, 3, 5)}) > 0
    assert all(t.grad is None for t in (x, *first.parameters(), *second.parameters()))
    assert torch.equal(torch.get_rng_state(), seed)


def test_is_recurrent_knows_ours_and_torchs():
    for name in NAMES:
        assert sk.is_recurrent(getattr(nn, name)(4, 5)) and sk.is_recurrent(getattr(sk, name)(4, 5))
    assert sk.is_recurrent(sk.LiGRU(4, 5)) and not sk.is_recurrent(nn.Linear(4, 5))


@pytest.mark.parametrize("name", ["GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*torch.ao")
def test_quantize_dynamic_gives_of_ours_what_it_gives_of_torchs(name):
    from torch.ao.quantization import quantize_dynamic

    model = nn.Sequential(getattr(nn, name)(4, 5), nn.Identity())
    expected = quantize_dynamic(model, {type(model[0])}, dtype=torch.qint8)
    sk.swap_in(model, cells=True)
    quantized = quantize_dynamic(model, {type(model[0])}, dtype=torch.qint8)
    assert type(quantized[0]) is type(expected[0]) is not getattr(nn, name)
    x = torch.randn(2, 4) if name.endswith("Cell") else torch.randn(3, 2, 4)
    torch.testing.assert_close(quantized[0](x), expected[0](x), rtol=0, atol=0)
    assert type(model[0]) is getattr(sk, name)  # the model that was given is as it was
    assert type(quantize_dynamic(model, dtype=torch.qint8)[0]) is getattr(sk, name)  # torch's default list has no ours
