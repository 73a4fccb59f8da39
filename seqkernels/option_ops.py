"""The operator pair of one layer with options (`seqkernels.cell_options`), beside that of plain cells in `ops`.

forward
    x, weights, h_0, c_0, batch_sizes: as of ``recurrence_forward``, of one layer; with blocks w_hh is ``[G*H, H/k]``
    norms: for each direction those of `CellOptions.norm_sizes`
    recurrent ``[D, B, P]``, candidate ``[D, B, H]``, zoneout_h ``[N, D, P]``, zoneout_c ``[N, D, H]``:
    `cell_options.Masks`, None where nothing is masked
    layer_norm: "", "True" or "gates"
    -> y ``[N, D*P]``, h_n ``[D, B, P]``, c_n ``[D, B, H]`` (else ``[D, B, 0]``)

backward
    -> gradients of x, weights, norms, h_0, c_0

Masks have no gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels._ops import ops
from seqkernels.backends import torch_steps
from seqkernels.backends.torch_steps import Variant
from seqkernels.double_backward import derivatives
from seqkernels.ops import register

_OF_LAYER = (
    "Tensor x, Tensor[] weights, Tensor[] norms, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, Tensor? recurrent, "
    "Tensor? candidate, Tensor? zoneout_h, Tensor? zoneout_c, str layer_norm, int blocks"
)
FORWARD_SCHEMA = f"(str cell, {_OF_LAYER}) -> (Tensor y, Tensor h_n, Tensor c_n)"
BACKWARD_SCHEMA = (
    f"(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, {_OF_LAYER}) "
    "-> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_norms, Tensor grad_h_0, Tensor grad_c_0)"
)
_NORMS: dict[str, bool | str] = {"": False, "True": True, "gates": "gates"}

_library = torch.library.Library(ops.name, "FRAGMENT")


def _forward(cell, x, weights, norms, h_0, c_0, batch_sizes, recurrent, candidate, *rest) -> tuple[Tensor, ...]:
    *zoneouts, layer_norm, blocks = rest
    variant = Variant(_NORMS[layer_norm], blocks, recurrent, candidate, *zoneouts)
    return torch_steps.forward(cell, x, weights, norms, h_0, c_0, batch_sizes, variant)


def _backward(cell, grad_y, grad_h_n, grad_c_n, x, weights, norms, h_0, c_0, *rest):
    """Runs the layer again, and differentiates its torch operations."""
    with torch.enable_grad():
        x, h_0, c_0, *parameters = (
            t if t is None else t.detach().requires_grad_() for t in (x, h_0, c_0, *weights, *norms)
        )
        weights, norms = parameters[: len(weights)], parameters[len(weights) :]
        results = _forward(cell, x, weights, norms, h_0, c_0, *rest)
    grads = grad_y, grad_h_n, grad_c_n
    wanted = [x, *weights, *norms, h_0, *([] if c_0 is None else [c_0])]
    grad_x, *found = derivatives(results, grads, wanted, [True] * len(wanted), False)
    grad_c_0 = h_0.new_empty(*h_0.shape[:2], 0) if c_0 is None else found.pop()
    grad_h_0 = found.pop()
    return grad_x, found[: len(weights)], found[len(weights) :], grad_h_0, grad_c_0


def _fake_forward(cell, x, weights, norms, h_0, c_0, *_):
    directions, sequences, projected = h_0.shape
    return (
        x.new_empty(x.shape[0], directions * projected),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        h_0.new_empty(directions, sequences, 0 if c_0 is None else c_0.shape[2]),
    )


def _fake_backward(cell, grad_y, grad_h_n, grad_c_n, x, weights, norms, h_0, c_0, *_):
    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape)

    grad_c_0 = h_0.new_empty(*h_0.shape[:2], 0) if c_0 is None else like(c_0)
    return like(x), [like(w) for w in weights], [like(n) for n in norms], like(h_0), grad_c_0


def _save_for_backward(ctx, inputs, output) -> None:
    cell, x, weights, norms, h_0, c_0, batch_sizes, *masks, layer_norm, blocks = inputs
    ctx.set_materialize_grads(False)
    ctx.cell, ctx.counts, ctx.kind = cell, (len(weights), len(norms)), (layer_norm, blocks)
    if c_0 is None:
        ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, h_0, c_0, batch_sizes, *masks, *weights, *norms)


def _autograd_formula(ctx, *grads):
    x, h_0, c_0, batch_sizes, *saved = ctx.saved_tensors
    masks, parameters, count = saved[:4], saved[4:], ctx.counts[0]
    weights, norms = parameters[:count], parameters[count:]
    grad_x, grad_weights, grad_norms, grad_h_0, grad_c_0 = ops.options_backward.torch_eager(
        ctx.cell, *grads, x, weights, norms, h_0, c_0, batch_sizes, *masks, *ctx.kind
    )
    of_states = grad_h_0, None if c_0 is None else grad_c_0
    return None, grad_x, grad_weights, grad_norms, *of_states, *[None] * 7


for _name, _schema, _implementation in (
    ("options_forward.torch_eager", FORWARD_SCHEMA, _forward),
    ("options_backward.torch_eager", BACKWARD_SCHEMA, _backward),
):
    _library.define(_name + _schema)
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
register(ops.options_forward.torch_eager, _fake_forward, (_autograd_formula, _save_for_backward), _library)
register(ops.options_backward.torch_eager, _fake_backward, None, _library)


def forward(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    variant: Variant,
    transformed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: for a compiler one operator; else, and within transforms that no operator passes (as `Call` says),
    plain torch operations, whose graph is the gradients'."""
    if transformed or not torch.compiler.is_compiling():
        return torch_steps.forward(cell, x, weights, norms, h_0, c_0, batch_sizes, variant)
    layer_norm, blocks, *masks = variant
    kind = next(name for name, value in _NORMS.items() if value == layer_norm)
    args = cell, x, list(weights), list(norms), h_0, c_0, batch_sizes, *masks, kind, blocks
    return ops.options_forward.torch_eager(*args)
