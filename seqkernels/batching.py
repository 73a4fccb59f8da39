"""How torch.vmap and batched gradients run the operators.

A batch of inputs for the same weights is one call, of more sequences. Else there is a call for each member.

There are two dispatch keys for that. torch.vmap has its rules (`torch.library.register_vmap`). `is_grads_batched`,
`jacobian(vectorize=True)` and gradcheck's `check_batched_grad` still go by an older one, torch._vmap_internals.
"""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqkernels import modes


def register(name: str, operator, library: torch.library.Library) -> None:
    """Give an operator, `name` in seqkernels, its rules for both."""

    def rule(info, in_dims, *args):
        dims = pytree.tree_leaves(list(in_dims), is_leaf=lambda dim: dim is None)
        if name.startswith("recurrence_forward"):
            args = _with_gradients(args)
            if _is_one_call(in_dims, *args):
                return _folded(operator, in_dims, info.batch_size, *args), (0, 0, 0, 0)
        outputs, structure = _each(operator, args, dims, info.batch_size)
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
        outputs, of_outputs = _each(operator, pytree.tree_unflatten(leaves, structure), dims, size)
        return pytree.tree_unflatten([torch._add_batch_dim(output, 0, level) for output in outputs], of_outputs)

    torch.library.register_vmap(f"seqkernels::{name}", rule, lib=library)
    library.impl(name, older_rule, "Batched")


def _with_gradients(args: tuple) -> tuple:
    """Arguments of a forward pass, which saves for gradients that are wanted outside of vmap: there they are seen only
    now."""
    cell, x, weights, h_0, c_0, batch_sizes, save, *rest = args
    save = save or modes.wants_gradients(x, *weights, h_0, c_0)
    return cell, x, weights, h_0, c_0, batch_sizes, save, *rest


def _is_one_call(in_dims, _, x, weights, h_0, c_0, batch_sizes, save, launch=(), layers=1) -> bool:
    """Whether members are inputs alone, of padded sequences. What several layers save is no rows that go apart."""
    shared = all(dim is None for dim in pytree.tree_leaves(list(in_dims[2]), is_leaf=lambda dim: dim is None))
    return shared and batch_sizes is None and (not save or layers == 1) and x.numel() > 0 and h_0.numel() > 0


def _folded(
    operator, in_dims, size: int, cell, x, weights, h_0, c_0, _, save, launch=(), layers=1
) -> tuple[Tensor, ...]:
    """One call for all members, as sequences side by side."""

    def members(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def states(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        return None if tensor is None else members(tensor, dim).transpose(0, 1).flatten(1, 2)

    h_0, c_0 = states(h_0, in_dims[3]), states(c_0, in_dims[4])
    sequences = h_0.shape[1] // size
    x = members(x, in_dims[1]).unflatten(1, (-1, sequences)).transpose(0, 1).flatten(0, 2)
    y, h_n, c_n, saved = operator(cell, x, weights, h_0, c_0, None, save, [], layers)
    y, saved = (t.unflatten(0, (-1, size, sequences)).transpose(0, 1).flatten(1, 2) for t in (y, saved))
    h_n, c_n = (t.unflatten(1, (size, sequences)).movedim(1, 0) for t in (h_n, c_n))
    return y, h_n, c_n, saved


def _each(operator, args, dims: list[int | None], size: int) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The results of the operator on every member, side by side; `dims`: where a leaf of args has its members."""
    leaves, structure = pytree.tree_flatten(list(args))
    members = []
    for i in range(size):
        own = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
        results, of_results = pytree.tree_flatten(operator(*pytree.tree_unflatten(own, structure)))
        members.append(results)
    return [torch.stack(results) for results in zip(*members, strict=True)], of_results
