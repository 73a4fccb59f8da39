"""The CUDA kernels of sequences that consist of pieces, as they run on a GPU or in the emulator: against plain torch
operations in float64, which tests/ops/test_pieces.py judges by each piece alone."""

from dataclasses import replace

import pytest
import torch
from cuda_paths import SINGLE_CTA, STEPWISE
from gpus import GPUS
from operators import BACKENDS, Call, backward, both_passes, forward, nan_in_fresh_memory, to_float64
from torch import Tensor

import seqkernels as sk
from seqkernels import select
from seqkernels.backends import side_by_side
from seqkernels.backends.call import Call as SelectCall
from seqkernels.hardware import Machine

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS, reason="neither a GPU with CUDA kernels nor an emulator, which `make test` builds"
)
OPERATORS = torch.ops.seqkernels
RAGGED = {"batch_sizes": (11, 9, 9, 4, 1), "hidden": 17}
SHAPES = {
    "padded": {"batch_sizes": (5,) * 6},
    "ragged both ways": {**RAGGED, "directions": 2},
    "spare rows": {**RAGGED, "directions": 2, "spare_rows": 3},
    "even": {**RAGGED, "hidden": 32, "bias": False},
    "one step": {"batch_sizes": (3,), "directions": 2},
}


def pieces_of(batch_sizes: tuple[int, ...], spare_rows: int = 0, share: float = 0.4) -> Tensor:
    """Of every row the piece that it is of, with a piece for each sequence and each mark, and one without rows."""
    generator = torch.Generator("cpu").manual_seed(3)
    last, count, pieces = list(range(batch_sizes[0])), batch_sizes[0] + 1, []
    for t, size in enumerate(batch_sizes):
        for b in range(size):
            if t and torch.rand((), generator=generator, device="cpu") < share:
                last[b], count = count, count + 1
            pieces.append(last[b])
    return torch.tensor(pieces + [-1] * spare_rows)


def call_of(cell: str, shape: str, **more) -> tuple[Call, Tensor]:
    call = Call(cell, **{**SHAPES[shape], **more})
    assert call.batch_sizes
    pieces = pieces_of(call.batch_sizes, call.spare_rows)
    return replace(call, sequences=int(pieces.max()) + 1), pieces


def passes_by(launch, call: Call, pieces: Tensor, tf32: bool = False):
    """Both operators, without the plan."""
    there, layers = pieces.clamp(min=0).to(torch.get_default_device()), call.layers

    def run(operator):
        return lambda *args: operator(*args[: len(args) - (2 if layers > 1 else 0)], tf32, *launch, layers, there)

    return run(OPERATORS.cuda_forward), run(OPERATORS.cuda_backward)


def in_float64(call: Call, pieces: Tensor) -> list[Tensor]:
    def run(operator):
        def with_pieces(*args):
            args = args[: len(args) - (2 if call.layers > 1 else 0)]
            return operator(*to_float64(args), [], call.layers, pieces.to(torch.get_default_device()))

        return with_pieces

    return both_passes(call, run(forward("torch_eager")), run(backward("torch_eager")))


def assert_rounding_alone(call: Call, pieces: Tensor, launch) -> None:
    with nan_in_fresh_memory():
        found = both_passes(call, *passes_by(launch, call, pieces))
    for k, (ours, right) in enumerate(zip(found, in_float64(call, pieces), strict=True)):
        if k == 3:  # what is saved, of which c is carried in another dtype
            continue
        error = (ours.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert ours.dtype == call.dtype and error <= 16 * torch.finfo(call.dtype).eps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm", "ligru"])
def test_pieces_err_by_rounding_alone(cell, shape):
    call, pieces = call_of(cell, shape)
    assert_rounding_alone(call, pieces, STEPWISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_pieces_by_a_single_cta_err_by_rounding_alone(cell, shape, dtype):
    for tile in (3, 8):
        call, pieces = call_of(cell, shape, dtype=dtype)
        assert_rounding_alone(call, pieces, SINGLE_CTA._replace(tile=tile))


def test_float32_is_multiplied_as_it_is_where_tf32_is_allowed():
    call, pieces = call_of("gru", "even", dtype=torch.float32)
    exact, allowed = (both_passes(call, *passes_by(SINGLE_CTA, call, pieces, tf32)) for tf32 in (False, True))
    assert all(map(torch.equal, exact, allowed))


@pytest.mark.parametrize("launch", [STEPWISE, SINGLE_CTA], ids=["stepwise", "single CTA"])
def test_layers_above_each_other(launch):
    call, pieces = call_of("lstm", "ragged both ways", layers=2, dtype=torch.float32)
    assert_rounding_alone(call, pieces, launch)


@pytest.mark.parametrize("launch", [STEPWISE, SINGLE_CTA], ids=["stepwise", "single CTA"])
def test_no_order_of_threads_changes_a_bit_of_pieces(launch, emulator):
    call, pieces = call_of("gru", "ragged both ways", dtype=torch.float32)
    expected = both_passes(call, *passes_by(launch, call, pieces))
    for seed in range(3):
        emulator.seed(seed)
        for ours, first in zip(both_passes(call, *passes_by(launch, call, pieces)), expected, strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize(
    ("facts", "chosen"),
    [
        (("gru", torch.bfloat16, 128), True),  # a single CTA either way
        (("gru", torch.float32, 128), True),
        (("lstm", torch.bfloat16, 256), False),  # by clusters on copied rows
        (("gru", torch.bfloat16, 512), False),
        (("lstm", torch.float64, 64), True),  # stepwise either way
    ],
)
def test_what_takes_less_time_is_chosen(facts, chosen):
    cell, dtype, hidden = facts
    machine = Machine(cuda_missing="", triton=True, cudnn=91900, gpu=GPUS["NVIDIA H200"])
    sizes = {"hidden_size": hidden, "input_size": hidden, "sequences": 64, "steps": 32, "training": True}
    call = SelectCall(cell, "cuda", dtype, **sizes)
    assert select.goes_piecewise(call, "device", machine) == chosen
    assert select.goes_piecewise(call, "device", machine, "cuda") == chosen
    assert not any(select.goes_piecewise(call, "device", machine, forced) for forced in ("cudnn", "torch_eager"))


def test_rows_stay_where_they_are(monkeypatch):
    """Nothing is copied into the order of pieces, and explain says so."""
    monkeypatch.setattr(side_by_side, "_side_by_side", None)
    layer, x, mask = sk.LSTM(3, 5, bidirectional=True), torch.randn(6, 3, 3), torch.rand(6, 3) < 0.4
    expected = layer(x, reset=mask)
    layer.backend = "cuda"
    torch.testing.assert_close(layer(x, reset=mask), expected)
    assert str(sk.explain(layer, x, reset=mask)).startswith("cuda: forced; single CTA, from piece to piece")
    lengths = torch.tensor([6, 2, 0])
    assert "pieces side by side" in str(sk.explain(layer, x, reset=mask, lengths=lengths))
