"""The operator gather_rows, by which rows go from one layout to another and back."""

import torch
from torch import Tensor

from seqkernels._ops import add_op_namespace_prefix, ops
from seqkernels.storage import expect_storage


def gather_rows(rows: Tensor, index: Tensor, inverse: Tensor, transformed: bool) -> Tensor:
    """rows[index], a zero row where index is -1. `inverse` serves the gradient, which is the same operator: no row is
    taken twice, so nothing need be added up. `transformed`: a torch.func transform is at work, which needs the plain
    operations."""
    return _gather(rows, index, inverse) if transformed else ops.gather_rows(rows, index, inverse)


def _gather(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if rows.shape[0] == 0:
        return rows.new_zeros(index.shape[0], rows.shape[1])
    return rows.index_select(0, index.clamp(min=0)).masked_fill((index < 0).unsqueeze(1), 0)


def _checked_gather(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """The operator."""
    expect_storage(("rows", rows), ("index", index), ("inverse", inverse))
    if index.device.type == "cpu" and rows.shape[0] and not (index < 0).any():
        return rows.index_select(0, index)  # no row goes nowhere: one pass instead of two
    return _gather(rows, index, inverse)


_library = torch.library.Library(ops.name, "FRAGMENT")
_library.define("gather_rows(Tensor rows, Tensor index, Tensor inverse) -> Tensor")
_library.impl("gather_rows", _checked_gather, "CompositeExplicitAutograd")


@torch.library.register_fake(add_op_namespace_prefix("gather_rows"), lib=_library)
def _(rows, index, inverse):
    return rows.new_empty(index.shape[0], rows.shape[1])


torch.library.register_autograd(
    add_op_namespace_prefix("gather_rows"),
    lambda ctx, grad: (ops.gather_rows(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2], inputs[1]),
    lib=_library,
)
