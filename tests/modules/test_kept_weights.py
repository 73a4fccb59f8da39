"""Packed weights that stay between calls: the same bits as without, whatever happens to the weights."""

import copy
import gc
import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from cases import CELLS
from operators import NO_CPU_KERNELS
from torch import nn

import seqkernels as sk
from seqkernels import functional, hardware, kept_weights
from seqkernels.backends.cells import CELLS as FACTS

pytestmark = pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=str(NO_CPU_KERNELS))

SIZES = dict(input_size=72, hidden_size=100)  # packed: more than the least that is kept; the last panel is no whole one
STEPS, SEQUENCES = 4, 20


def layer_of(cell: str = "gru", **more) -> nn.Module:
    torch.manual_seed(0)
    more |= {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    return getattr(sk, FACTS[cell].display_name)(**SIZES, **more).eval()


def input_of(layer: nn.Module, steps: int = STEPS, sequences: int = SEQUENCES) -> torch.Tensor:
    weight = next(layer.parameters())
    return torch.randn(steps, sequences, layer.input_size, generator=torch.manual_seed(1)).to(weight.dtype)


def packing_anew(layer: nn.Module, x, **more):
    """What a call gives that finds no packed weights."""
    hx, options = None, {"lengths": more.pop("lengths", None)}
    for name in ("bias", "num_layers", "bidirectional", "batch_first"):
        options[name] = getattr(layer, name)
    weights = [weight.detach().clone() for weight in layer._flat_weights]
    return functional.recurrent(layer.mode.lower(), x, hx, weights, **options)


def flat(results) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return [leaf for result in results if result is not None for leaf in flat(result)]


def expect_same(layer: nn.Module, x, **more) -> None:
    with torch.no_grad():
        for given, expected in zip(flat(layer(x, **more)), flat(packing_anew(layer, x, **more)), strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=0)


def panels_packed(layer: nn.Module) -> int:
    return kept_weights.kept(layer)[1]


VARIANTS = {
    "one": {},
    "stack": dict(num_layers=2, bidirectional=True),
    "batch_first": dict(batch_first=True, bias=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_a_second_call_packs_nothing_and_has_the_same_bits(cell, dtype, variant):
    layer = layer_of(cell, **VARIANTS[variant]).to(dtype)
    x = input_of(layer)
    expect_same(layer, x)
    packed = panels_packed(layer)
    assert packed > 0
    expect_same(layer, x + 1)
    assert panels_packed(layer) == packed


@pytest.mark.parametrize("batch", ["packed", "lengths", "unbatched", "steps"])
def test_other_batches_take_the_same_weights(batch):
    layer = layer_of("lstm")
    x = input_of(layer, 12, 6)
    expect_same(layer, x)
    packed = panels_packed(layer)
    lengths = torch.tensor([12, 9, 8, 8, 3, 1])
    if batch == "packed":
        expect_same(layer, nn.utils.rnn.pack_padded_sequence(x, lengths))
    elif batch == "lengths":
        expect_same(layer, x, lengths=lengths)
    else:
        expect_same(layer, x[:, 0] if batch == "unbatched" else x[:11])
    assert panels_packed(layer) == packed


def test_a_projection_is_kept_as_well():
    layer = layer_of("lstm", proj_size=40)
    x = input_of(layer)
    for _ in range(2):
        expect_same(layer, x)
        layer.weight_hr_l0.data[-1, -1] += 1
    expect_same(layer, x)


# ---- nothing is stale

CHANGES = {
    "in place": lambda weight: weight.detach().mul_(1.5),
    "through data": lambda weight: weight.data.add_(0.25),
    "another data": lambda weight: setattr(weight, "data", weight.data.clone() * 2),
    "through NumPy": lambda weight: weight.detach().numpy().__setitem__((3, 5), 7.0),
    "signs": lambda weight: weight.data.neg_(),
    "two rows": lambda weight: weight.data.__setitem__([4, 9], weight.data[[9, 4]].clone()),
    "two columns": lambda weight: weight.data.__setitem__((slice(None), [0, 16]), weight.data[:, [16, 0]].clone()),
    "the last number": lambda weight: weight.data[-1, -1].add_(1),
    "the last bit": lambda weight: weight.data.view(torch.int32)[7, 7].bitwise_xor_(1),
}


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change, name):
    layer = layer_of()
    x = input_of(layer)
    expect_same(layer, x)
    packed = panels_packed(layer)
    CHANGES[change](getattr(layer, name))
    expect_same(layer, x)
    assert panels_packed(layer) > packed


def test_any_number_that_changes_is_seen():
    layer = layer_of("rnn_tanh")
    x = input_of(layer)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        for k in torch.randperm(weight.numel(), generator=torch.manual_seed(2))[:60]:
            expect_same(layer, x)
            packed = panels_packed(layer)
            weight.data.view(-1)[k] *= -1
            expect_same(layer, x)
            assert panels_packed(layer) == packed + 1


def test_trained_loaded_assigned_and_moved_weights():
    layer = layer_of()
    x = input_of(layer)
    other = layer_of(bias=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(3):
        expect_same(layer, x)
        layer(x)[0].sum().backward()
        optimizer.step()
    expect_same(layer, x)
    layer.load_state_dict(other.state_dict())
    expect_same(layer, x)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
    expect_same(layer, x)
    layer.double()
    expect_same(layer, x.double())
    layer.float()
    expect_same(layer, x)


def test_tied_parametrized_and_functional_weights():
    first, second = layer_of(), layer_of()
    x = input_of(first)
    second.weight_ih_l0, second.weight_hh_l0 = first.weight_ih_l0, first.weight_hh_l0
    nn.utils.parametrizations.weight_norm(first, "weight_hh_l0")
    for factor in (1, 2, 3):
        first.parametrizations.weight_hh_l0.original0.data *= factor
        first.weight_ih_l0.data *= factor
        expect_same(first, x)
        expect_same(second, x)
    doubled = {name: parameter.detach() * 2 for name, parameter in second.named_parameters()}
    with torch.no_grad():
        given = torch.func.functional_call(second, doubled, (x,))
        other = layer_of()
        other.load_state_dict(doubled)
        torch.testing.assert_close(given, packing_anew(other, x), rtol=0, atol=0)
    expect_same(second, x)


def test_instruction_sets_pack_for_themselves(instruction_set):
    layer = layer_of()
    x = input_of(layer)
    expect_same(layer, x)
    hardware.native().force_isa("baseline")
    expect_same(layer, x)
    hardware.native().force_isa(instruction_set)
    expect_same(layer, x)


def test_autocast():
    layer = layer_of()
    x = input_of(layer)
    for _ in range(2):  # torch casts a weight once in each region
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expect_same(layer, x)
            packed = panels_packed(layer)
            expect_same(layer, x)
            assert panels_packed(layer) == packed > 0
        layer.weight_hh_l0.data.mul_(1.5)
    expect_same(layer, x)


def test_frozen_weights_are_kept_where_others_train():
    layer = layer_of().requires_grad_(False)
    x = input_of(layer).requires_grad_()
    given = layer(x)[0]
    given.sum().backward()
    packed = panels_packed(layer)
    assert packed > 0
    layer(x)
    assert panels_packed(layer) == packed
    torch.testing.assert_close(given, packing_anew(layer, x.detach())[0], rtol=0, atol=0)


# ---- modules, threads and processes


def test_training_keeps_nothing():
    layer = layer_of()
    layer(input_of(layer))[0].sum().backward()
    assert kept_weights.kept(layer) == (0, 0)


def test_copies_have_their_own_and_none_in_what_is_saved():
    layer = layer_of()
    x = input_of(layer)
    expect_same(layer, x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    for other in (copy.deepcopy(layer), copy.copy(layer), loaded):
        assert kept_weights.kept(other) == (0, 0)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.data = parameter.data * 2
        expect_same(other, x)
    assert set(layer.state_dict()) == set(nn.GRU(**SIZES).state_dict())


def test_memory_is_that_of_the_weights_and_goes_with_the_module():
    gc.collect()  # modules of other tests, whose places would be free before this one's
    layer = layer_of(num_layers=2)
    x = input_of(layer)
    expect_same(layer, x)
    size = sum(weight.nbytes for weight in layer._flat_weights if weight.dim() == 2)
    for steps in (2, 5, 12):
        expect_same(layer, input_of(layer, steps))
    kept, place = kept_weights.kept(layer)[0], kept_weights.place_of(layer)
    assert size <= kept < 1.1 * size
    del layer
    gc.collect()
    assert hardware.native().kept_weights(place) == (0, 0)
    assert kept_weights.place_of(layer_of()) == place


def test_calls_that_use_packed_weights_often_or_hardly_keep_none():
    layer = layer_of()
    expect_same(layer, input_of(layer, 200))
    expect_same(layer, input_of(layer, 1, 2))
    small = sk.GRU(8, 8)
    expect_same(small, input_of(small))
    assert kept_weights.kept(layer)[0] == kept_weights.kept(small)[0] == 0


def test_threads_take_weights_in_turns():
    layer = layer_of("lstm")
    xs = [input_of(layer) + k for k in range(4)]
    expected = [flat(packing_anew(layer, x)) for x in xs]
    failures = []

    def call(k: int) -> None:
        for _ in range(50):
            with torch.inference_mode():
                if not all(map(torch.equal, flat(layer(xs[k])), expected[k])):
                    failures.append(k)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_module_may_keep_none():
    layer = layer_of()
    layer.keep_packed = False
    expect_same(layer, input_of(layer))
    assert kept_weights.kept(layer) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own():
    code = """if True:
        import os, torch, seqkernels as sk
        torch.set_num_threads(1)
        layer = sk.GRU(72, 100)
        x = torch.randn(4, 20, 72)
        with torch.no_grad():
            before = layer(x)[0]
            child = os.fork()
            if not child:
                same = torch.equal(layer(x)[0], before)
                layer.weight_hh_l0.data.mul_(2)
                os._exit(0 if same and not torch.equal(layer(x)[0], before) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert torch.equal(layer(x)[0], before)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_environment_switches_it_off():
    code = """if True:
        import torch, seqkernels as sk
        from seqkernels import kept_weights
        layer = sk.GRU(72, 100)
        with torch.no_grad():
            layer(torch.randn(4, 20, 72))
        assert not kept_weights.ON and kept_weights.kept(layer) == (0, 0)
    """
    environment = os.environ | {"SEQKERNELS_KEEP_PACKED": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
