"""The Triton backend in Triton's interpreter, or on the GPU that is here: both paths, in every dtype they take."""

from dataclasses import replace

import pytest
import torch
from cases import Case
from operators import (
    BACKENDS,
    BELOW_FLOAT64,
    CELLS,
    SHAPES,
    Call,
    assert_as_in_float64,
    assert_rounding_alone,
    both_passes,
    calls,
    nan_in_fresh_memory,
)
from operators import backward as backward_of
from operators import forward as forward_of
from specification import assert_right

from seqkernels.backends.triton import layer as triton_layer
from seqkernels.backends.triton.tiles import Launch
from seqkernels.hardware import NO_TRITON

pytestmark = [pytest.mark.skipif("triton" not in BACKENDS, reason=NO_TRITON), pytest.mark.slow]
forward, backward = (of("triton") if "triton" in BACKENDS else None for of in (forward_of, backward_of))


@pytest.fixture(params=["resident", "stepwise"])
def path(request, monkeypatch) -> str:
    """Take one path, wherever the other would be taken as well."""
    if request.param == "stepwise":
        monkeypatch.setattr(triton_layer, "launch_of", lambda call, gpu: Launch(call.tf32, False, 4, 128, 4))
    return request.param


@pytest.mark.parametrize("call", calls(torch.float32))
def test_both_paths_compute_what_torch_eager_does(call, path):
    if path == "resident" and (call.projected or call.hidden > 32):
        pytest.skip("there is no resident kernel for it: the stepwise test is the one")
    assert_as_in_float64(both_passes(call, forward, backward), call)


@BELOW_FLOAT64
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_both_paths_err_by_rounding_alone(cell, bias, dtype, path):
    call = Call(cell, 2, 19, 6, 29, batch_sizes=(19, 17, 3, 2, 2, 1), bias=bias, dtype=dtype)
    assert_rounding_alone(call, "triton")


@pytest.mark.parametrize("shape", ["ragged both ways", "spare rows", "steps in which nothing runs"])
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_that_only_the_device_knows_give_the_same_results(cell, shape, path, monkeypatch):
    """The host then multiplies for all sequences in every step; the kernels leave alone what does not run."""
    call = Call(cell, dtype=torch.float32, **SHAPES[shape])
    steps = triton_layer.Layer.steps

    def all_sequences(layer, back=False):
        layer.known = [layer.B] * layer.T
        return steps(layer, back)

    monkeypatch.setattr(triton_layer.Layer, "steps", all_sequences)
    assert_as_in_float64(both_passes(call, forward, backward), call)


def test_sizes_are_written_on_the_device_as_a_graph_can_capture():
    for sizes in ([5, 5, 3, 1, 1], [2], [4, 3, 0, 0], []):
        sizes = torch.tensor(sizes, dtype=torch.int64)
        assert torch.equal(triton_layer._written_there(sizes, torch.device("cpu")), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [name for name, shape in SHAPES.items() if shape.get("hidden", 0) < 100])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_read_before_it_is_written(cell, shape, dtype, path):
    """All that torch allocates starts as NaN."""
    call = Call(cell, dtype=dtype, **SHAPES[shape])
    call = replace(call, steps=min(call.steps, 30))  # more allocate the same, and take the interpreter minutes
    with nan_in_fresh_memory():
        assert torch.empty(1).isnan()
        results = both_passes(call, forward, backward)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.skipif(torch.get_default_device().type == "cpu", reason="TF32 is a GPU's")
@pytest.mark.parametrize("hidden_size", [16, 61, 64, 128])
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_close_as_torchs(cell, hidden_size, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert_right(Case(cell, torch.float32, "padded", (21,) * 19, 30, hidden_size, bidirectional=True), "triton", 2)


def test_a_backward_that_does_not_fit_is_refused():
    cell, *layer, save = Call("gru", dtype=torch.float32).arguments()
    y, h_n, _, saved = forward(cell, *layer, save)
    with pytest.raises(RuntimeError, match="saved is"):
        backward(cell, y, h_n, None, *layer, y, saved[:, :, 1:], True, True)
    with pytest.raises(RuntimeError, match="grad_y is"):
        backward(cell, y[1:], h_n, None, *layer, y, saved, True, True)
