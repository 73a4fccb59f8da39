"""Sequences that consist of pieces: the operators give what they give of each piece alone."""

from dataclasses import replace

import pytest
import torch
from operators import BACKENDS, CELLS, NO_CPU_KERNELS, SLOW_MARKED, Call, forward, nan_in_fresh_memory, recompute
from torch.utils import _pytree as pytree

from seqkernels.backends import torch_eager

SIZES = (4, 4, 3, 1, 0)
# By step and sequence. Piece 3 has no rows; two rows behind the last step are of no piece.
PIECES = torch.tensor([0, 1, 5, 6, 0, 2, 5, 7, 4, 2, 8, 4, -1, -1])
CALL = Call("gru", hidden=5, batch_sizes=SIZES, sequences=9, spare_rows=2)
DEEP = {"cell": "lstm", "projected": 3, "directions": 2, "layers": 2}


def by_pieces(cell, x, weights, h_0, c_0, batch_sizes, save, launch=(), layers=1, pieces=None):
    """Each piece by itself, through plain torch operations: y, h_n, c_n."""
    y, ends = x.new_zeros(len(x), weights[1].shape[1] * len(h_0) // layers), []
    for piece in range(h_0.shape[1]):
        rows = (pieces == piece).nonzero().flatten()
        states = [None if s is None else s[:, piece : piece + 1] for s in (h_0, c_0)]
        alone = torch_eager.forward(cell, x[rows], weights, *states, None, False, (), layers)
        y = y.index_add(0, rows, alone[0])
        ends.append(alone[1:3])
    return y, *(torch.cat(states, 1) for states in zip(*ends, strict=True))


def arguments(call: Call, requires_grad: bool = False) -> tuple:
    *args, save = call.arguments(requires_grad)[:7]
    return *args, save, [], call.layers, PIECES


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", [*CELLS, "lstm projected"])
def test_results_and_gradients_are_those_of_the_pieces_alone(cell, directions, layers, backend):
    projected = 3 if "projected" in cell else None
    call = replace(CALL, cell=cell.split()[0], directions=directions, layers=layers, projected=projected)
    args = arguments(replace(call, dtype=torch.float32) if backend == "triton" else call, requires_grad=True)
    found, expected = forward(backend)(*args)[:3], by_pieces(*args)
    torch.testing.assert_close(found, expected)
    _, x, weights, *states = args[:5]
    wanted = [x, *weights, *(state for state in states if state is not None)]
    outputs = 3 if call.cell == "lstm" else 2
    torch.manual_seed(1)
    grads = [torch.randn_like(t) for t in expected[:outputs]]
    of_each = [torch.autograd.grad(results[:outputs], wanted, grads) for results in (found, expected)]
    torch.testing.assert_close(*of_each)


PADDED = torch.tensor([[0, 1, 2], [0, 3, 2], [0, 3, 4], [5, 3, 4]])  # piece 6 has no rows


def padded_arguments(call: Call) -> tuple:
    """With pieces, but without batch_sizes."""
    args = replace(call, batch_sizes=(PADDED.shape[1],) * len(PADDED), spare_rows=0).arguments(requires_grad=True)
    return *args[:5], None, True, [], 1, PADDED


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_padded_sequences_lie_anywhere(backend):
    *args, pieces = padded_arguments(replace(CALL, sequences=7, dtype=torch.float32))
    expected = by_pieces(*args, pieces.flatten())
    for given in (pieces, pieces.t().contiguous().t()):
        torch.testing.assert_close(forward(backend)(*args, given)[:3], expected)
    args[5], apart = torch.tensor([3] * 4), torch.stack([pieces.flatten(), 6 - pieces.flatten()], 1)[:, 0]
    torch.testing.assert_close(forward(backend)(*args, apart)[:3], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequence_has_no_pieces(backend):
    cell, x, weights, h_0, *rest, pieces = padded_arguments(replace(CALL, sequences=7, dtype=torch.float32))
    y, h_n, *_ = forward(backend)(cell, x[:0], weights, h_0, *rest, pieces[:, :0])
    assert y.shape == (0, 5) and torch.equal(h_n, h_0)
    assert torch.equal(torch.autograd.grad(h_n.square().sum(), h_0)[0], 2 * h_0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_projection_between_steps_has_a_gradient_however_many_states_there_are(backend):
    args = padded_arguments(Call("lstm", projected=2, sequences=20, dtype=torch.float32))
    results = forward(backend)(*args), by_pieces(*args[:-1], PADDED.flatten())
    grads = (torch.autograd.grad(c_n.square().sum(), args[2]) for _, _, c_n, *_ in results)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [{"hidden": 33, "dtype": torch.bfloat16}, {"hidden": 160}], ids=["pairs", "wide"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_results_of_many_pieces_are_those_of_a_ragged_batch(backend, shape):
    """Members of a team share the units of few sequences; those of many are shared out."""
    for sequences in (2, 70):
        torch.manual_seed(0)
        starts = torch.rand(12, sequences) < 0.2
        starts[0] = True
        pieces = (starts.t().reshape(-1).cumsum(0) - 1).view(sequences, 12).t().reshape(-1)
        call = Call("lstm", sequences=int(pieces.max()) + 1, batch_sizes=(sequences,) * 12, **shape)
        args = *call.arguments(), [], 1, pieces
        tolerance = {"rtol": 0.02, "atol": 0.02} if call.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(forward(backend)(*args)[:3], by_pieces(*args), **tolerance)


@pytest.mark.parametrize("backend", SLOW_MARKED)
def test_running_again_gives_the_same_gradients(backend):
    args = arguments(replace(CALL, dtype=torch.float32), requires_grad=True)
    cell, *of_stack, _, launch, layers, pieces = args
    y, h_n, *_ = forward(backend)(*args)
    expected = torch.autograd.grad([y, h_n], [of_stack[0], *of_stack[1], of_stack[2]], [y.detach(), h_n.detach()])
    options = True, True, launch, layers, pieces
    grad_x, grads, grad_h_0, _ = recompute(backend)(cell, y.detach(), h_n.detach(), None, *of_stack, *options)
    torch.testing.assert_close((grad_x, *grads, grad_h_0), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("layers", [1, 2])
def test_opcheck(backend, layers):
    args = arguments(replace(CALL, layers=layers, dtype=torch.float32), requires_grad=True)
    torch.library.opcheck(forward(backend), args)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_gradients_of_gradients(backend):
    cell, x, weights, h_0, *rest = arguments(replace(CALL, hidden=2), requires_grad=True)

    def run(x, h_0, *weights):
        return forward(backend)(cell, x, list(weights), h_0, *rest)[:2]

    assert torch.autograd.gradgradcheck(run, (x, h_0, *weights))


@pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=NO_CPU_KERNELS)
@pytest.mark.parametrize("own", [False, True], ids=["the same pieces", "pieces of their own"])
@pytest.mark.parametrize("shape", [{}, DEEP], ids=["gru", "deep"])
def test_members_of_vmap_are_their_own_calls(shape, own):
    members = [arguments(replace(CALL, **shape, seed=k)) for k in range(3)]
    cell, *_, batch_sizes, save, launch, layers, pieces = members[0]
    pieces = torch.stack([pieces, (pieces + 1) % 9, (pieces + 2) % 9]) if own else pieces

    def run(x, weights, states, pieces):
        args = cell, x, weights, *[*states, None][:2], batch_sizes, save, launch, layers, pieces
        return forward("cpu")(*args)[: 1 + len(states)]

    def both_passes(run, tensors, pieces):
        leaves, structure = pytree.tree_flatten(tensors)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        results = run(*pytree.tree_unflatten(leaves, structure), pieces)
        return [*results, *torch.autograd.grad(sum(t.square().sum() for t in results), leaves)]

    of_each = [(x, weights, [h_0] if c_0 is None else [h_0, c_0]) for _, x, weights, h_0, c_0, *_ in members]
    stacked = pytree.tree_map(lambda *of_one: torch.stack(of_one), *of_each)
    with nan_in_fresh_memory():
        found = both_passes(torch.vmap(run, (0, 0, 0, 0 if own else None)), stacked, pieces)
    for i, tensors in enumerate(of_each):
        expected = both_passes(run, tensors, pieces[i] if own else pieces)
        assert all(torch.equal(ours[i], right) for ours, right in zip(found, expected, strict=True))


BAD = {
    "no batch_sizes": ({"batch_sizes": None}, "pieces go with batch_sizes|no whole number of steps"),
    "too few": ({"pieces": PIECES[:-1]}, r"pieces is \[rows\], int64.* one for each of the 14 rows of x"),
    "int32": ({"pieces": PIECES.int()}, r"pieces is \[rows\], int64"),
    "no such state": ({"pieces": PIECES.clone().index_fill_(0, torch.tensor(3), 9)}, "numbers of the 9 states of h_0"),
    "negative": ({"pieces": PIECES.clone().index_fill_(0, torch.tensor(3), -1)}, "numbers of the 9 states of h_0"),
    "in two sequences": ({"pieces": PIECES.clone().index_fill_(0, torch.tensor(2), 0)}, "do not follow each other"),
    "begun again": ({"pieces": PIECES.clone().index_fill_(0, torch.tensor(8), 1)}, "do not follow each other"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_that_do_not_fit_are_refused(backend, bad):
    change, message = BAD[bad]
    cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces = arguments(
        replace(CALL, dtype=torch.float32)
    )
    given = {"batch_sizes": batch_sizes, "pieces": pieces} | change
    with pytest.raises(RuntimeError, match=message):
        forward(backend)(cell, x, weights, h_0, c_0, given["batch_sizes"], save, launch, layers, given["pieces"])
