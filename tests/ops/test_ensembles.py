"""The operators for ensembles: each member is what its own call is, to the bit."""

from dataclasses import replace

import pytest
import torch
from operators import CELLS, NO_CPU_KERNELS, SHAPES, Call, backward, calls, forward, nan_in_fresh_memory, recompute
from torch import Tensor
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.skipif(bool(NO_CPU_KERNELS), reason=NO_CPU_KERNELS)
SHARED = {  # arguments that members have in common
    "nothing": (),
    "x": ("x",),
    "states": ("h_0", "c_0"),
    "weights": ("weights",),
    "grad_y": ("grad_y",),
}
STACKS = {
    "padded": {},
    "three layers both ways": {"layers": 3, "directions": 2, "hidden": 8, "input": 7},
    "ragged layers": {"layers": 2, **SHAPES["ragged both ways"]},
}
BELOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def is_of_member(leaf) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def ensemble_of(members: list):
    """Arguments of members as those of their ensemble."""

    def joined(*leaves):
        return torch.stack(leaves) if is_of_member(leaves[0]) else leaves[0]

    return pytree.tree_map(joined, members[0], *members[1:])


def member_of(args, i: int):
    return pytree.tree_map(lambda leaf: leaf[i] if is_of_member(leaf) else leaf, args)


def ensemble(call: Call, size: int = 5, shared=(), save: bool = True) -> list:
    args = list(ensemble_of([replace(call, seed=10 * k).arguments(save=save) for k in range(size)]))
    for k, name in enumerate(("cell", "x", "weights", "h_0", "c_0")):
        if name in shared:
            args[k] = pytree.tree_map(lambda t: t[0].expand_as(t) if is_of_member(t) else t, args[k])
    return args


def gradients(call: Call, results, shared=()) -> list:
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results[:3]]
    if "grad_y" in shared:
        grads[0] = grads[0][0].expand_as(grads[0])
    return grads if call.cell == "lstm" else [*grads[:2], None]


def both_passes(call: Call, args, grads, backend: str, wants=(True, True)) -> list[Tensor]:
    cell, *stack = args[:6]
    y, h_n, c_n, saved = forward(backend)(*args)
    found = backward(backend)(cell, *grads, *stack, y, saved, *wants, *args[7:])
    return [y, h_n, c_n, saved, *pytree.tree_leaves(found)]


def assert_members(call: Call, size: int = 5, shared=(), wants=(True, True), args=None) -> None:
    args = ensemble(call, size, shared) if args is None else args
    grads = gradients(call, forward("cpu_ensemble")(*args), shared)
    with nan_in_fresh_memory():
        found = both_passes(call, args, grads, "cpu_ensemble", wants)
    for i in range(size):
        expected = both_passes(call, member_of(args, i), member_of(grads, i), "cpu", wants)
        for ours, right in zip(found, expected, strict=True):
            assert torch.equal(ours[i], right)


@pytest.mark.parametrize("call", [c for c in calls() if not any(size in c.id for size in ("many", "deep"))])
def test_members_are_their_own_calls(call):
    assert_members(call, size=3)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("cell", CELLS)
def test_members_share_what_has_a_stride_of_none(cell, stack, shared):
    for wants in ((True, True), (False, True), (True, False)):
        assert_members(Call(cell, **STACKS[stack]), shared=SHARED[shared], wants=wants)


@BELOW
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_below_float64(cell, dtype):
    for sizes in ({"hidden": 6, "input": 3}, {"hidden": 16, "input": 8, "sequences": 9, "layers": 2}):
        assert_members(Call(cell, dtype=dtype, directions=2, **sizes), size=3)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 5, 7, 16])
def test_any_number_of_members_on_any_number_of_threads(threads, size):
    """Some alone on a thread, and those that are left by all threads."""
    torch.set_num_threads(threads)
    for shape in ({"hidden": 64, "sequences": 8, "steps": 5}, {"hidden": 3}, {"hidden": 150, "sequences": 2}):
        assert_members(Call("gru", dtype=torch.float32, **shape), size)


def test_members_may_lie_anywhere():
    call = Call("lstm", projected=2, directions=2)

    def apart(leaf):  # members are contiguous, with something between them
        return torch.cat([leaf, leaf], 0)[::2] if is_of_member(leaf) else leaf

    def across(leaf):  # members are not contiguous
        return leaf.movedim(0, -1).contiguous().movedim(-1, 0) if is_of_member(leaf) else leaf

    def shared(leaf):  # nor is what they share
        if not is_of_member(leaf):
            return leaf
        one = leaf[0]
        return one.mT.contiguous().mT.expand_as(leaf) if one.dim() > 1 else one.expand_as(leaf)

    for lies in (apart, across, shared):
        assert_members(call, args=pytree.tree_map(lies, ensemble(call)))


def test_no_members():
    call = Call("gru")
    args = [a[:0] if is_of_member(a) else a for a in ensemble(call)]
    args[2] = [w[:0] for w in args[2]]
    assert forward("cpu_ensemble")(*args)[0].shape[0] == 0


@pytest.mark.parametrize("shape", ["padded", "ragged both ways"])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, shape):
    call = Call(cell, hidden=3, **SHAPES[shape])
    args = ensemble(call, 2)
    wanting = pytree.tree_map(lambda t: t.requires_grad_() if is_of_member(t) else t, ensemble(call, 2))
    torch.library.opcheck(forward("cpu_ensemble"), tuple(wanting))
    torch.library.opcheck(forward("cpu_ensemble"), (*args[:6], False))
    cell, *stack, _ = args
    y, *results, saved = forward("cpu_ensemble")(*args)
    grads = gradients(call, (y, *results))
    torch.library.opcheck(backward("cpu_ensemble"), (cell, *grads, *stack, y, saved, True, True))
    torch.library.opcheck(backward("cpu_ensemble"), (cell, *grads, *stack, y, saved, False, False))
    torch.library.opcheck(recompute("cpu_ensemble"), (cell, *grads, *stack, True, True))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients(cell, save):
    found = []
    args = ensemble(Call(cell, hidden=4, layers=2), 3, save=save)
    for run in (
        lambda args: forward("cpu_ensemble")(*args),
        lambda args: ensemble_of([forward("cpu")(*member_of(args, i)) for i in range(3)]),
    ):
        own = pytree.tree_map(lambda t: t.clone().requires_grad_() if is_of_member(t) else t, args)
        inputs = [leaf for leaf in pytree.tree_leaves(own) if is_of_member(leaf)]
        y, h_n, c_n, _ = run(own)
        loss = y.sin().sum() + h_n.cos().sum() + (c_n.sum() if cell == "lstm" else 0)
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
        found.append([*grads, *again])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-12)


def test_what_does_not_fit_is_refused():
    args = ensemble(Call("gru"))
    for k, wrong, message in (
        (1, args[1][0], r"x is \[members, rows, input size\], got 2 dimensions"),
        (3, args[3][0], r"h_0 is \[members, directions, sequences, hidden size\], got 3 dimensions"),
        (3, args[3][:2], r"h_0 is \[5, 1, 3, 5\], got \[2, 1, 3, 5\]"),
        (2, [args[2][0][0], *args[2][1:]], r"w_ih is \[members, gates \* hidden size, input size\], got 2"),
        (2, [*args[2][:3], args[2][3][:3]], r"b_hh is \[5, 15\], got \[3, 15\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward("cpu_ensemble")(*args[:k], wrong, *args[k + 1 :])
