"""Packed weights that stay between calls: the same bits as without, whatever happens to the weights."""

import copy
import gc
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import CELLS
from operators import NO_CPU_KERNELS
from torch import nn

import seqkernels as sk
from seqkernels import functional, hardware, kept_weights
from seqkernels.backends.cells import CELLS as FACTS

pytestmark = pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=str(NO_CPU_KERNELS))

SIZES = dict(input_size=120, hidden_size=100)  # packed: more than the least that stays; the last panel is no whole one
STEPS, SEQUENCES = 5, 20


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


def panels_kept(layer: nn.Module, x, **more) -> int:
    """How often panels were packed, once they stay: from the second call of a kind on."""
    expect_same(layer, x, **more)
    expect_same(layer, x, **more)
    return panels_packed(layer)


VARIANTS = {
    "one": {},
    "stack": dict(num_layers=2, bidirectional=True),
    "batch_first": dict(batch_first=True, bias=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_a_third_call_packs_nothing_and_has_the_same_bits(cell, dtype, variant):
    layer = layer_of(cell, **VARIANTS[variant]).to(dtype)
    x = input_of(layer)
    expect_same(layer, x)
    assert panels_packed(layer) == 0
    packed = panels_kept(layer, x)
    assert packed > 0
    expect_same(layer, x + 1)
    assert panels_packed(layer) == packed


@pytest.mark.parametrize("batch", ["packed", "lengths", "unbatched", "steps", "step"])
def test_other_batches_take_the_same_weights(batch):
    layer = layer_of("lstm")
    x = input_of(layer, 15, 12)
    packed = panels_kept(layer, x)
    assert packed > 0
    lengths = torch.tensor([15, 13, 12, 9, 9, 9, 8, 7, 6, 5, 3, 1])
    if batch == "packed":
        expect_same(layer, nn.utils.rnn.pack_padded_sequence(x, lengths))
    elif batch == "lengths":
        expect_same(layer, x, lengths=lengths)
    elif batch == "step":
        with torch.no_grad():
            many = torch.randn(200, layer.input_size)
            torch.testing.assert_close(layer.step(many)[0], packing_anew(layer, many[None])[0][0], rtol=0, atol=0)
    else:
        expect_same(layer, x.reshape(180, -1) if batch == "unbatched" else x[:14])
    assert panels_packed(layer) == packed


def test_a_projection_is_kept_as_well():
    layer = layer_of("lstm", proj_size=40)
    x = input_of(layer)
    for _ in range(3):
        assert panels_kept(layer, x) > 0
        layer.weight_hr_l0.data[-1, -1] += 1
    expect_same(layer, x)


@pytest.mark.parametrize("region", [False, True], ids=["float32", "autocast"])
def test_cells_keep_theirs_where_tiles_multiply(region, monkeypatch):
    """Elsewhere a step packs none, and nothing is kept of one that says it might be."""
    monkeypatch.setattr(hardware, "THIS_MACHINE", hardware.THIS_MACHINE._replace(isa="amx"))
    torch.manual_seed(0)
    cell = sk.LSTMCell(120, 100)
    other = copy.deepcopy(cell)
    other.keep_packed = False
    x, hx = torch.randn(100, 120), (torch.randn(100, 100), torch.randn(100, 100))
    for _ in range(4):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=region):
            assert all(map(torch.equal, cell(x, hx), other(x, hx)))
        for module in (cell, other):
            module.weight_hh.data[-1, -1] += 1
    assert kept_weights.slot_of(cell) and not kept_weights.slot_of(other)
    assert (panels_packed(cell) > 0) == (region and hardware.native().isa() == "amx")


def test_what_alternates_leaves_what_is_kept():
    layer = layer_of()
    x = input_of(layer)
    packed = panels_kept(layer, x)
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expect_same(layer, x)
        expect_same(layer, x)
    assert panels_packed(layer) == packed


# ---- nothing is stale


def swap_columns(weight: torch.Tensor, *columns: int) -> None:
    weight.data[:, list(columns)] = weight.data[:, list(reversed(columns))]


CHANGES = {
    "in place": lambda weight: weight.detach().mul_(1.5),
    "through data": lambda weight: weight.data.add_(0.25),
    "another data": lambda weight: setattr(weight, "data", weight.data.clone() * 2),
    "through NumPy": lambda weight: weight.detach().numpy().__setitem__((3, 5), 7.0),
    "signs": lambda weight: weight.data.neg_(),
    "two rows": lambda weight: weight.data.__setitem__([4, 9], weight.data[[9, 4]].clone()),
    "two columns": lambda weight: swap_columns(weight, 0, 16),
    "turned columns": lambda weight: weight.data.copy_(weight.data.roll(16, 1)),
    "the last number": lambda weight: weight.data[-1, -1].add_(1),
    "the last bit": lambda weight: weight.data.view(torch.int32)[7, 7].bitwise_xor_(1),
}


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change, name):
    layer = layer_of()
    x = input_of(layer)
    packed = panels_kept(layer, x)
    CHANGES[change](getattr(layer, name))
    expect_same(layer, x)
    assert panels_packed(layer) > packed > 0


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_sparse_and_striped_weights_that_change_their_places(name):
    layer = layer_of()
    x, weight = input_of(layer), getattr(layer, name).data
    stripes = torch.arange(weight.shape[1]) // 8 % 2
    for first, then in (((0, 24), (8, 16)), ((11,), (67,))):
        for columns in (first, then):
            weight.zero_()[0, list(columns)] = 2.0
            panels_kept(layer, x)
    for pattern in (stripes, 1 - stripes, stripes.roll(16)):
        weight.copy_(pattern.expand_as(weight))
        panels_kept(layer, x)


def test_any_number_that_changes_is_seen():
    layer = sk.RNN(160, 120).eval()
    x = input_of(layer)
    panels_kept(layer, x)
    for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
        for k in torch.randperm(weight.numel(), generator=torch.manual_seed(2))[:60]:
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
    layer = layer_of(num_layers=2)
    x = input_of(layer)
    for _ in range(2):  # torch casts a weight once in each region
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            packed = panels_kept(layer, x)
            expect_same(layer, x)
            assert panels_packed(layer) == packed > 0
        layer.weight_hh_l0.data.mul_(1.5)
    expect_same(layer, x)


# ---- modules, threads and processes


def test_calls_with_gradients_keep_nothing():
    layer = layer_of()
    x = input_of(layer)
    for given in (x, x.requires_grad_()):
        for _ in range(3):
            layer(given)[0].sum().backward()
        layer.requires_grad_(False)
    assert kept_weights.kept(layer) == (0, 0)
    assert panels_kept(layer, x.detach()) > 0  # frozen


def test_copies_have_their_own_and_modules_show_nothing_of_it():
    layer = layer_of()
    x = input_of(layer)
    attributes = set(layer.__dict__)
    assert panels_kept(layer, x) > 0
    assert attributes == set(layer.__dict__)
    saved = io.BytesIO()
    torch.save(layer, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
    parametrized = nn.utils.parametrizations.weight_norm(layer_of(), "weight_hh_l0")
    assert panels_kept(parametrized, x) > 0
    for other in (copy.deepcopy(layer), copy.deepcopy(parametrized), copy.copy(layer), loaded):
        assert kept_weights.kept(other) == (0, 0)
        other.weight_ih_l0 = nn.Parameter(other.weight_ih_l0.detach() * 2)
        assert panels_kept(other, x) > 0
    expect_same(layer, x)
    expect_same(parametrized, x)


def test_memory_is_that_of_the_weights_and_goes_with_the_module():
    gc.collect()  # modules of other tests
    layer = layer_of(num_layers=2)
    size = sum(weight.nbytes for weight in layer._flat_weights if weight.dim() == 2)
    for steps in (5, 7, 12):
        panels_kept(layer, input_of(layer, steps))
    kept, slot = kept_weights.kept(layer)[0], kept_weights.slot_of(layer)
    assert 2 * size <= kept < 2.2 * size
    del layer
    gc.collect()
    assert hardware.native().kept_weights(slot) == (0, 0)
    assert kept_weights.slot_of(layer_of()) == slot


@pytest.mark.parametrize("how", ["double", "meta", "keep_packed"])
def test_memory_goes_with_weights_that_move(how):
    layer = layer_of()
    x = input_of(layer)
    assert panels_kept(layer, x) > 0
    if how == "keep_packed":
        layer.keep_packed = False
        expect_same(layer, x)
        expect_same(layer, x)
    else:
        layer.double() if how == "double" else layer.to("meta")
    assert kept_weights.kept(layer) == (0, 0)


def test_calls_that_use_packed_weights_often_or_hardly_keep_none():
    layer = layer_of()
    for steps, sequences in ((300, 1), (1, 2), (3, 16)):
        panels_kept(layer, input_of(layer, steps, sequences))
    small = sk.GRU(8, 60)
    panels_kept(small, input_of(small))
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

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own():
    code = """if True:
        import os, torch, seqkernels as sk
        torch.set_num_threads(1)
        layer = sk.GRU(120, 100)
        x = torch.randn(5, 20, 120)
        with torch.no_grad():
            before = [layer(x)[0] for _ in range(3)][0]
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
        layer = sk.GRU(120, 100)
        with torch.no_grad():
            for _ in range(3):
                layer(torch.randn(5, 20, 120))
        assert not kept_weights.ON and kept_weights.kept(layer) == (0, 0)
    """
    environment = os.environ | {"SEQKERNELS_KEEP_PACKED": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
