"""Factors of float32 as sums of bfloat16, where torch's switch allows it and the CPU has AMX."""

import pytest
import torch
from operators import (
    CELLS,
    Call,
    assert_rounding_alone_of,
    backward,
    both_passes,
    calls,
    forward,
    in_float64,
    nan_in_fresh_memory,
)

import seqkernels as sk
from seqkernels import hardware, select
from seqkernels.backends.call import Call as Planned

CPU = torch.device("cpu")
EPS = {1: 2.0**-8, 2: 2.0**-15}  # of a bfloat16, and of the sum of two

needs_amx = pytest.mark.skipif("amx" not in hardware.THIS_MACHINE.isa, reason="no AMX is in use")


@pytest.fixture(autouse=True)
def restored():
    before = torch.backends.mkldnn.rnn.fp32_precision, torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before[1])
    torch.backends.mkldnn.rnn.fp32_precision = before[0]


@pytest.mark.parametrize(
    "rnn, matmul, parts",
    [
        ("none", "highest", 0),
        ("none", "high", 2),
        ("none", "medium", 1),
        ("ieee", "medium", 0),
        ("tf32", "highest", 2),
        ("bf16", "highest", 1),
    ],
)
def test_torchs_switches(rnn, matmul, parts):
    torch.set_float32_matmul_precision(matmul)
    torch.backends.mkldnn.rnn.fp32_precision = rnn
    assert hardware.bfloat16_parts(CPU, torch.float32) == parts
    assert hardware.bfloat16_parts(CPU, torch.float64) == hardware.bfloat16_parts(CPU, torch.bfloat16) == 0
    assert hardware.bfloat16_parts(torch.device("cuda"), torch.float32) == 0


def test_only_amx_does_it_and_the_plan_says_so():
    call = Planned("gru", "cpu", torch.float32, bfloat16_parts=2)
    with_amx, without = (hardware.Machine(isa=isa) for isa in ("amx", "avx512_bf16"))
    assert select.plan(call, with_amx).launch == (2,)
    assert select.plan(call, with_amx).kernel == "amx, float32 multiplied as two bfloat16"
    assert select.plan(call._replace(bfloat16_parts=1), with_amx).kernel == "amx, float32 multiplied as one bfloat16"
    assert select.plan(call, without)[3:] == ("avx512_bf16", ())
    assert select.plan(call._replace(bfloat16_parts=0), with_amx)[3:] == ("amx", ())


def passes(parts: int) -> tuple:
    """Both operators of the CPU, of which float32 is multiplied as so many bfloat16."""
    return tuple(lambda *args, run=run: run(*args, [parts]) for run in (forward("cpu"), backward("cpu")))


@needs_amx
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("call", calls(torch.float32))
def test_it_loses_what_bfloat16_does_not_hold(call, parts):
    with nan_in_fresh_memory():
        assert_rounding_alone_of(call, *passes(parts), eps=EPS[parts])


@needs_amx
def test_more_parts_hold_more():
    call = Call("gru", sequences=20, steps=4, input=41, hidden=48, dtype=torch.float32)
    right = in_float64(call)
    for results in zip(*(both_passes(call, *passes(parts)) for parts in (1, 2, 0)), right, strict=True):
        one, two, exact = ((found - results[3]).norm() for found in results[:3])
        if results[3].numel():
            assert one > 50 * two > 200 * exact


@needs_amx
@pytest.mark.parametrize("cell", CELLS)
def test_a_few_rows_are_multiplied_as_they_are(cell):
    """They wait for the weights, and not for products."""
    call = Call(cell, sequences=2, steps=4, input=24, hidden=32, dtype=torch.float32)
    for found, exact in zip(both_passes(call, *passes(1)), both_passes(call, *passes(0)), strict=True):
        assert torch.equal(found, exact)


@needs_amx
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.4e38, 1e-40, float("nan")])
@pytest.mark.parametrize("setting", ["tf32", "bf16"])
@pytest.mark.parametrize("cls", [sk.GRU, sk.LSTM, sk.RNN])
def test_no_factor_makes_a_nan_that_is_none_in_float32(cls, setting, value):
    torch.manual_seed(0)
    layer, x = cls(40, 48), torch.randn(6, 16, 40)
    x[3, 2, 5] = value
    found = []
    with torch.no_grad():
        for precision in (setting, "ieee"):
            torch.backends.mkldnn.rnn.fp32_precision = precision
            found.append(layer(x)[0])
    assert torch.equal(found[0].isnan(), found[1].isnan())
    torch.testing.assert_close(*found, rtol=0, atol=0.05, equal_nan=True)


@needs_amx
def test_the_backward_pass_multiplies_as_its_forward_pass_did():
    torch.manual_seed(0)
    layer, x = sk.GRU(24, 32), torch.randn(9, 8, 24)

    def gradient(before: str, after: str) -> torch.Tensor:
        torch.set_float32_matmul_precision(before)
        y = layer(x)[0]
        torch.set_float32_matmul_precision(after)
        return torch.autograd.grad(y.sum(), layer.weight_hh_l0)[0]

    assert torch.equal(gradient("medium", "highest"), gradient("medium", "medium"))
    assert not torch.equal(gradient("medium", "highest"), gradient("highest", "highest"))


@needs_amx
def test_compiled_code_multiplies_as_was_set_when_it_was_compiled():
    torch.manual_seed(0)
    layer, x = sk.GRU(24, 32), torch.randn(9, 8, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for setting in ("high", "highest"):
        torch.set_float32_matmul_precision(setting)
        torch._dynamo.reset()
        assert torch.equal(compiled(x)[0], layer(x)[0])
