"""How torch.vmap and batched gradients run the operators: one call for each member of the batch.

There are two dispatch keys for that. torch.vmap has its rules (`torch.library.register_vmap`). `is_grads_batched`,
`jacobian(vectorize=True)` and gradcheck's `check_batched_grad` still go by an older one, torch._vmap_internals.
"""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def register(name: str, operator, library: torch.library.Library) -> None:
    """Give an operator, `name` in seqkernels, its rules for both."""

    def rule(info, in_dims, *args):
        dims = pytree.tree_leaves(list(in_dims), is_leaf=lambda dim: dim is None)
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


def _each(operator, args, dims: list[int | None], size: int) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The results of the operator on every member, side by side; `dims`: where a leaf of args has its members."""
    leaves, structure = pytree.tree_flatten(list(args))
    members = []
    for i in range(size):
        own = [leaf if dim is None else leaf.select(dim, i) for leaf, dim in zip(leaves, dims, strict=True)]
        results, of_results = pytree.tree_flatten(operator(*pytree.tree_unflatten(own, structure)))
        members.append(results)
    return [torch.stack(results) for results in zip(*members, strict=True)], of_results
