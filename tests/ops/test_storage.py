"""Tensors whose storage was freed or shrunk: refused, never read."""

import pytest
import torch
from operators import BACKENDS, Call, backward, forward
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels as sk
from seqkernels._ops import ops

LAYER = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h_0", "c_0", "batch_sizes")
GRADIENTS = ("grad_y", "grad_h_n", "grad_c_n", "y", "saved")
MASKS = ("recurrent", "candidate", "zoneout_h", "zoneout_c")
NORMS = ("gates_x", "w_hh", "scale", "shift", "scale_c", "shift_c", "h_0", "c_0", "batch_sizes", *MASKS)


def named_arguments(backend: str) -> dict[str, Tensor]:
    """All tensors that the operators of an LSTM with a projection take."""
    call = Call("lstm", projected=2, batch_sizes=(3, 2), dtype=torch.float32)
    _, x, weights, h_0, c_0, batch_sizes, _ = call.arguments()
    y, h_n, c_n, saved = forward(backend)("lstm", x, weights, h_0, c_0, batch_sizes, True)
    layer = dict(zip(LAYER, (x, *weights, h_0, c_0, batch_sizes), strict=True))
    grads = [torch.ones_like(tensor) for tensor in (y, h_n, c_n)]
    return layer | dict(zip(GRADIENTS, (*grads, y, saved), strict=True))


def run_forward(backend: str, of: dict[str, Tensor]) -> None:
    weights = [of[name] for name in LAYER[1:6]]
    forward(backend)("lstm", of["x"], weights, of["h_0"], of["c_0"], of["batch_sizes"], True)


def run_backward(backend: str, of: dict[str, Tensor]) -> None:
    layer = of["x"], [of[name] for name in LAYER[1:6]], of["h_0"], of["c_0"], of["batch_sizes"]
    grads = [of[name] for name in GRADIENTS[:3]]
    backward(backend)("lstm", *grads, *layer, of["y"], of["saved"], True, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [0, 0.5, 1], ids=["freed", "halved", "one byte less"])
@pytest.mark.parametrize("name", (*LAYER, *GRADIENTS))
def test_a_storage_that_holds_less_than_its_tensor_is_refused(name, kept, backend):
    of = named_arguments(backend)
    storage = of[name].untyped_storage()
    storage.resize_(int(storage.nbytes() * kept) - (kept == 1))
    for run in [run_backward] if name in GRADIENTS else [run_forward, run_backward]:
        with pytest.raises(RuntimeError, match=rf"{name}.*out of bounds for storage of size {storage.nbytes()}"):
            run(backend, of)


def masks() -> dict[str, Tensor]:
    """Those of 5 rows of 3 sequences, of 5 hidden units."""
    return dict(
        zip(MASKS, (torch.ones(1, 3, 5), torch.ones(1, 3, 5), torch.ones(5, 1, 5), torch.ones(5, 1, 5)), strict=True)
    )


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in ("cpu", "cuda", "triton")])
@pytest.mark.parametrize("name", MASKS)
def test_masks_whose_storage_was_freed_are_refused(name, backend):
    of_layer = Call("lstm", batch_sizes=(3, 2), dtype=torch.float32).arguments()[:-1]
    of = masks()
    freed(of[name])
    with pytest.raises(RuntimeError, match=rf"{name}.*out of bounds for storage of size 0"):
        getattr(ops.masked_forward, backend)(*of_layer, *of.values(), True, [0])


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend in ("cpu", "cuda", "triton")])
@pytest.mark.parametrize("name", NORMS)
def test_what_layer_norm_takes_is_refused_where_its_storage_was_freed(name, backend):
    sizes = (5, 1, 20), (1, 20, 5), (1, 20), (1, 20), (1, 5), (1, 5), (1, 3, 5), (1, 3, 5)
    of = dict(zip(NORMS, (*map(torch.ones, sizes), torch.tensor([3, 2]), *masks().values()), strict=True))
    freed(of[name])
    with pytest.raises(RuntimeError, match=rf"{name}.*out of bounds for storage of size 0"):
        getattr(ops.layer_norm_forward, backend)("lstm", *of.values(), False, True, [0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_reaches_as_far_as_its_offset_and_strides_say(backend):
    of = named_arguments(backend)
    rows, width = of["x"].shape
    wide = torch.zeros(rows + 1, 2 * width)
    of["x"] = wide[1:, ::2]
    run_forward(backend, of)
    wide.untyped_storage().resize_(wide.untyped_storage().nbytes() - 2 * wide.element_size())
    with pytest.raises(RuntimeError, match=r"x: sizes .* out of bounds"):
        run_forward(backend, of)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def packed(free: str | None = None) -> PackedSequence:
    batch = pack_padded_sequence(torch.randn(6, 3, 4), [2, 4, 6], enforce_sorted=False)
    if free:
        freed(getattr(batch, free))
    return batch


FREED = {  # what torch itself reads without a look at its storage
    "lengths": lambda rnn: rnn(torch.randn(6, 3, 4), lengths=freed(torch.tensor([1, 2, 3]))),
    "input with lengths": lambda rnn: rnn(freed(torch.randn(6, 3, 4)), lengths=torch.tensor([1, 2, 3])),
    "state of a packed batch": lambda rnn: rnn(packed(), freed(torch.randn(1, 3, 5))),
    "batch sizes": lambda rnn: rnn(packed("batch_sizes")),
    "cu_seqlens": lambda rnn: sk.functional.gru(
        torch.randn(6, 4), None, rnn._flat_weights, cu_seqlens=freed(torch.tensor([0, 2, 6]))
    ),
}


@pytest.mark.parametrize("what", FREED)
def test_freed_storages_on_the_way_to_the_operators_are_refused(what):
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
        FREED[what](sk.GRU(4, 5))
