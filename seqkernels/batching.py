"""How torch.vmap and batched gradients run the operators.

A batch of inputs for the same weights is one call of recurrence_forward, with more sequences. Else, and of every other
operator, it is one call of that for ensembles, where the backend has one, and a call for each member where it has not,
or where each has its own batch_sizes or pieces.

There are two dispatch keys for that. torch.vmap has its rules (`torch.library.register_vmap`). `is_grads_batched`,
`jacobian(vectorize=True)` and gradcheck's `check_batched_grad` still go by an older one, torch._vmap_internals.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqkernels import modes
from seqkernels._ops import add_op_namespace_prefix


class Members(NamedTuple):
    """How an operator runs members of torch.vmap: a function for one, and for all in one call where there is one, with
    the members in front of every tensor but batch_sizes and pieces."""

    one: Callable
    ensemble: Callable | None

    def run(self, args: Sequence, dims: list[int | None], size: int) -> tuple[list[Tensor], pytree.TreeSpec]:
        """The results of all members, side by side; `dims`: where a leaf of args has its members."""
        leaves, structure = pytree.tree_flatten(list(args))
        pairs = list(zip(leaves, dims, strict=True))
        if self.ensemble is None or any(dim is not None and not may_be_members(leaf) for leaf, dim in pairs):
            return each_member(self.one, args, dims, size)
        own = [in_front(leaf, dim, size) if may_be_members(leaf) else leaf for leaf, dim in pairs]
        return pytree.tree_flatten(self.ensemble(*pytree.tree_unflatten(own, structure)))

    def forward(self, args: Sequence, in_dims: Sequence, size: int) -> tuple[Tensor, ...]:
        """The results of a forward pass: without pytree, which costs more than small members."""
        cell, x, weights, h_0, c_0, batch_sizes, *options = args
        _, of_x, of_weights, of_h_0, of_c_0, of_sizes, _, *of_options = in_dims
        if _is_one_call(in_dims, *args):
            return _folded(self.one, in_dims, size, *args)
        of_pieces = of_options[2] if len(of_options) > 2 else None  # behind launch and layers
        if self.ensemble is None or of_sizes is not None or of_pieces is not None:
            return tuple(each_member(self.one, args, pytree.tree_leaves(list(in_dims), is_leaf=_is_none), size)[0])
        return self.ensemble(
            cell,
            in_front(x, of_x, size),
            [in_front(weight, dim, size) for weight, dim in zip(weights, of_weights, strict=True)],
            in_front(h_0, of_h_0, size),
            None if c_0 is None else in_front(c_0, of_c_0, size),
            batch_sizes,
            *options,
        )


def register(name: str, members: Members, library: torch.library.Library) -> None:
    """Give an operator, `name` in seqkernels, its rules for both."""

    def rule(info, in_dims, *args):
        if name.startswith("recurrence_forward"):
            return members.forward(_with_gradients(args), in_dims, info.batch_size), (0, 0, 0, 0)
        dims = pytree.tree_leaves(list(in_dims), is_leaf=_is_none)
        outputs, structure = members.run(args, dims, info.batch_size)
        return pytree.tree_unflatten(outputs, structure), pytree.tree_unflatten([0] * len(outputs), structure)

    def older_rule(*args):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, structure = pytree.tree_flatten(list(args))
        batched = [isinstance(leaf, Tensor) and torch._C._functorch.is_legacy_batchedtensor(leaf) for leaf in leaves]
        leaves = [
            torch._remove_batch_dim(leaf, level, 0, 0) if there else leaf
            for leaf, there in zip(leaves, batched, strict=True)
        ]
        size = next(len(leaf) for leaf, there in zip(leaves, batched, strict=True) if there)
        dims = [0 if there else None for there in batched]
        outputs, of_outputs = members.run(pytree.tree_unflatten(leaves, structure), dims, size)
        return pytree.tree_unflatten([torch._add_batch_dim(output, 0, level) for output in outputs], of_outputs)

    torch.library.register_vmap(add_op_namespace_prefix(name), rule, lib=library)
    library.impl(name, older_rule, "Batched")


def forward_of_level(
    members: Members, cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A forward pass within torch.vmap, as the rule of its operator does it, without the way through the dispatcher,
    which costs more than small members. What runs the members is outside of this level."""
    functorch = torch._C._functorch
    interpreter = functorch.peek_interpreter_stack()
    level = interpreter.level()
    pairs = [
        (t, None) if t is None else functorch._unwrap_batched(t, level)
        for t in (x, h_0, c_0, batch_sizes, pieces, *weights)
    ]
    (x, h_0, c_0, batch_sizes, pieces, *weights), dims = zip(*pairs, strict=True)
    of_x, of_h_0, of_c_0, of_sizes, of_pieces, *of_weights = dims
    args = cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces
    outer = functorch.pop_dynamic_layer_stack()
    try:
        if all(map(_is_none, dims)):
            return members.one(*args)
        in_dims = None, of_x, of_weights, of_h_0, of_c_0, of_sizes, None, [None] * len(launch), None, of_pieces
        results = members.forward(args, in_dims, functorch.CVmapInterpreterPtr(interpreter).batchSize())
    finally:
        functorch.push_dynamic_layer_stack(outer)
    y, h_n, c_n, saved = (functorch._add_batch_dim(result, 0, level) for result in results)
    return y, h_n, c_n, saved


def _is_none(dim) -> bool:
    return dim is None


def may_be_members(leaf) -> bool:
    """Whether an argument of an operator has the members of an ensemble in front: every tensor but batch_sizes
    and pieces."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    if dim is None:
        return tensor.expand(size, *tensor.shape)
    return tensor.movedim(dim, 0) if dim else tensor


def _with_gradients(args: Sequence) -> tuple:
    """Arguments of a forward pass, which saves for gradients that are wanted outside of vmap: there they are seen only
    now."""
    cell, x, weights, h_0, c_0, batch_sizes, save, *rest = args
    save = save or modes.wants_gradients(x, *weights, h_0, c_0)
    return cell, x, weights, h_0, c_0, batch_sizes, save, *rest


def _is_one_call(in_dims, _, x, weights, h_0, c_0, batch_sizes, save, launch=(), layers=1, pieces=None) -> bool:
    """Whether members are inputs alone, of padded sequences. What several layers save is no rows that go apart. Nor is
    it an ensemble, which an outer torch.vmap sees."""
    if any(dim is not None for dim in in_dims[2]) or weights[0].dim() > 2:
        return False
    return batch_sizes is None and pieces is None and (not save or layers == 1) and x.numel() > 0 and h_0.numel() > 0


def _folded(
    operator, in_dims, size: int, cell, x, weights, h_0, c_0, _, save, launch=(), layers=1, pieces=None
) -> tuple[Tensor, ...]:
    """One call for all members, as sequences side by side."""

    def states(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        return None if tensor is None else in_front(tensor, dim, size).transpose(0, 1).flatten(1, 2)

    h_0, c_0 = states(h_0, in_dims[3]), states(c_0, in_dims[4])
    sequences = h_0.shape[1] // size
    x = in_front(x, in_dims[1], size).unflatten(1, (-1, sequences)).transpose(0, 1).flatten(0, 2)
    # Of the launch what is true of any number of sequences: its first number, how products are rounded.
    y, h_n, c_n, saved = operator(cell, x, weights, h_0, c_0, None, save, launch[:1], layers, None)
    y, saved = (t.unflatten(0, (-1, size, sequences)).transpose(0, 1).flatten(1, 2) for t in (y, saved))
    h_n, c_n = (t.unflatten(1, (size, sequences)).movedim(1, 0) for t in (h_n, c_n))
    return y, h_n, c_n, saved


def each_member(function, args, dims: list[int | None], size: int) -> tuple[list[Tensor], pytree.TreeSpec]:
    """Its results for every member, side by side; `dims`: where a leaf of args has its members."""
    leaves, structure = pytree.tree_flatten(list(args))
    if size == 0:  # a member of zeros says what shapes results have; by the cat they depend on the arguments
        leaves = [leaf if dim is None else _with_one(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]
    members = []
    for i in range(max(size, 1)):
        own = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
        results, of_results = pytree.tree_flatten(function(*pytree.tree_unflatten(own, structure)))
        members.append(results)
    return [torch.stack(results)[:size] for results in zip(*members, strict=True)], of_results


def _with_one(leaf: Tensor, dim: int) -> Tensor:
    zeros = leaf.new_zeros(*leaf.shape[:dim], 1, *leaf.shape[dim + 1 :])
    return torch.cat([leaf, zeros], dim)
