"""A call of a layer with `CellOptions`: masks, and layer by layer the operators or plain torch operations.

What multiplies weights and inputs, and blocks, are calls of the operators as without options, so that every backend
runs them. What changes a step itself, only the backends run that have it (`Call.options`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqkernels import cell_options, checks, layer_norm_ops, masked_ops, modes, ops, option_ops, select
from seqkernels.backends import autocast, stack
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.torch_steps import Variant
from seqkernels.cell_options import CellOptions, Masks
from seqkernels.inputs import Inputs


class Parts(NamedTuple):
    """What a call with options is made of."""

    cell_options: CellOptions
    norms: Sequence[Tensor]  # for each layer, for each direction those of `CellOptions.norm_sizes`, in that order
    training: bool
    of_step: tuple[str, ...]  # `CellOptions.of_step`
    by_block: bool  # a layer is a recurrence for each block, which norms over the gates of all do not let it be
    by_layer: bool  # layers do something else than those without options, but for what their weights are

    def of_layers(self, layers: int) -> "list[Parts]":
        """The parts of each layer."""
        each = len(self.norms) // layers
        return [self._replace(norms=self.norms[k * each : (k + 1) * each]) for k in range(layers)]


def made_of(options: CellOptions, norms: Sequence[Tensor], training: bool, projected: bool) -> Parts:
    """The parts of a call, unchecked."""
    of_step, by_block = options.of_step(training, projected), options.blocks > 1 and not options.layer_norm
    by_layer = options.blocks > 1 or of_step != () or (training and options.input_dropout > 0)
    return Parts(options, norms, training, of_step, by_block, by_layer)


def parts_of(
    cell: str,
    weights: Sequence[Tensor],
    options: CellOptions | None,
    norms: Sequence[Tensor],
    training: bool,
    count: int,
    bias: bool,
) -> Parts | None:
    """The parts of a call of `count` layers and directions, checked; None: no options are given.

    Raises:
        TypeError, ValueError: options that are none, or that this cell or its sizes cannot have.
        RuntimeError: weights or norms of other shapes.
    """
    if options is None:
        if norms:
            raise ValueError("norms are the parameters of layer_norm; give cell_options that have it")
        return None
    if not isinstance(options, CellOptions):
        raise TypeError(f"cell_options are seqkernels.CellOptions, got {type(options).__name__}")
    projected = len(weights) // count % 2 == 1
    if len(weights) >= 2 * count:  # else `checks.check_call` says what is wrong
        _check_sizes(cell, weights[1], options, norms, count, bias, projected)
    return made_of(options, norms, training, projected)


def _check_sizes(
    cell: str, w_hh: Tensor, options: CellOptions, norms: Sequence[Tensor], count: int, bias: bool, projected: bool
) -> None:
    gates = w_hh.shape[0]
    hidden_size = gates // CELLS[cell].gates
    sizes = options.norm_sizes(cell, hidden_size, bias, projected)
    if options.blocks > 1 and w_hh.shape[1] * options.blocks != hidden_size:
        columns = hidden_size // options.blocks
        raise RuntimeError(f"of {options.blocks} blocks w_hh is [{gates}, {columns}], got {list(w_hh.shape)}")
    if len(norms) != len(sizes) * count:
        names = f" ({', '.join(sizes)})" if sizes else ""
        raise ValueError(
            f"layer_norm={options.layer_norm!r} has {len(sizes)} norms{names} for each of {count} layers and "
            f"directions, got {len(norms)} in all"
        )
    for (name, size), norm in zip([*sizes.items()] * count, norms, strict=True):
        if norm.shape != (size,):
            raise RuntimeError(f"{name} is [{size}], got {list(norm.shape)}")
        checks.check_same(norm, w_hh, name)


def plan_of(inputs: Inputs, parts: Parts, backend: str | None) -> select.Plan:
    """The plan of each layer.

    Raises:
        ValueError: the backend that is forced has no such cells.
    """
    call, blocks = inputs.call, parts.cell_options.blocks
    if parts.of_step:
        call = call._replace(options=parts.of_step)
    if parts.by_block:
        call = call._replace(hidden_size=call.hidden_size // blocks, layers=1)
    plan = select.plan_of(call, inputs.rows.data.device, backend)
    if not parts.by_block or (parts.of_step and plan.backend == "torch_eager"):
        return plan
    order = "side by side" if plan.backend in ops.ENSEMBLES and not parts.of_step else "one after another"
    each = f"{order} {blocks} blocks of units"
    return plan._replace(kernel=f"{plan.kernel}, {each}" if plan.kernel else each)


def run(
    plan: select.Plan, inputs: Inputs, weights: Sequence[Tensor], parts: Parts, dropout: float, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers, with dropout between them -> y, h_n, c_n, as `seqkernels.functional.run`."""
    layers, weights = inputs.call.layers, dropped(weights, parts, len(inputs.h_0))
    x, call, h_n, c_n = inputs.rows.data, inputs.call._replace(layers=1), [], []
    each = stack.each(layers, weights, inputs.h_0, inputs.c_0)
    for layer, ((of_layer, h_0, c_0), own) in enumerate(zip(each, parts.of_layers(layers), strict=True)):
        if layer and dropout > 0:
            x = F.dropout(x, dropout, True)
        x, masks = drawn(own, x, h_0, c_0, inputs.rows.batch_sizes)
        x, h, c = run_layer(plan, call, own, x, of_layer, h_0, c_0, inputs.rows.batch_sizes, masks, recompute)
        h_n.append(h)
        c_n.append(c)
    return x, torch.cat(h_n), torch.cat(c_n)


def drawn(parts: Parts, x: Tensor, h_0: Tensor, c_0: Tensor | None, batch_sizes: Tensor | None) -> tuple[Tensor, Masks]:
    """The masks of one layer, and its input, to which its own has been applied."""
    masks = cell_options.draw(parts.cell_options, parts.training, x, h_0, c_0)
    return x if masks.input is None else _masked_rows(x, masks.input, batch_sizes), masks


def run_layer(
    plan: select.Plan, call, parts: Parts, x: Tensor, weights, h_0, c_0, batch_sizes, masks: Masks, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, whose input is masked already -> y, h_n, c_n."""
    options, args = parts.cell_options, (x, weights, h_0, c_0, batch_sizes)
    if plan.backend == "torch_eager" and parts.of_step:
        return _steps(call, *args, parts.norms, variant_of(options, masks), recompute)
    if parts.by_block:
        return _by_blocks(plan, call, options.blocks, *args, masks, recompute)
    return _by_kernels(plan, call, *args, masks, recompute, parts.norms, options.layer_norm)


def variant_of(options: CellOptions, masks: Masks) -> Variant:
    return Variant(options.layer_norm, options.blocks, *masks[1:])


def _by_kernels(
    plan, call, x, weights, h_0, c_0, batch_sizes, masks: Masks, recompute: bool, norms=(), layer_norm=False
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer by the operators of the backend."""
    wanted = modes.wants_gradients(x, h_0, c_0, *weights, *norms)
    if all(mask is None for mask in masks[1:]) and not layer_norm:
        return ops.recurrence_forward(plan, call, x, weights, h_0, c_0, batch_sizes, wanted, recompute)

    def compute(x, weights, norms, h_0, c_0) -> tuple[Tensor, Tensor, Tensor]:
        # torch.vmap lets nobody see whether gradients are wanted outside of it.
        save = torch.is_grad_enabled() and (wanted or call.vmapped)
        if not layer_norm:
            return masked_ops.forward(plan, call.cell, x, weights, h_0, c_0, batch_sizes, masks, save)
        of_layer = x, weights, norms, h_0, c_0, batch_sizes
        return layer_norm_ops.forward(plan, call.cell, *of_layer, layer_norm, masks, save)

    return computed(compute, wanted and recompute, x, list(weights), list(norms), h_0, c_0)


def computed(compute: Callable, again: bool, x: Tensor, *args):
    """In the dtype of autocast. Nothing of its intermediate results is saved if they are to be computed `again`, but
    within torch.func's transforms, which have no hooks for that."""
    if torch.is_autocast_enabled(x.device.type):
        compute = autocast.cast_arguments(compute, x.device.type)
    again = again and not modes.transformed()
    return checkpoint(compute, x, *args, use_reentrant=False, preserve_rng_state=False) if again else compute(x, *args)


def _by_blocks(
    plan, call, blocks: int, x, weights, h_0, c_0, batch_sizes, masks: Masks, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer as a recurrence for each block of units, all of the same input."""
    call, units = call._replace(hidden_size=call.hidden_size // blocks), h_0.shape[2] // blocks
    weights = [_weight_by_block(weight, blocks, units) for weight in weights]
    h_0, c_0, *of_step = (None if t is None else _by_block(t, blocks) for t in (h_0, c_0, *masks[1:]))
    ensemble = ops.ENSEMBLES.get(plan.backend)
    if ensemble and not call.transformed and all(mask is None for mask in of_step):
        plan, x = plan._replace(backend=ensemble), x.expand(blocks, *x.shape)
        none = Masks(None, *of_step)
        y, h_n, c_n = _by_kernels(plan, call, x, weights, h_0, c_0, batch_sizes, none, recompute)
    else:
        found = []
        for block in range(blocks):
            h, c, *drawn = (None if t is None else t[block] for t in (h_0, c_0, *of_step))
            own = [weight[block] for weight in weights]
            found.append(_by_kernels(plan, call, x, own, h, c, batch_sizes, Masks(None, *drawn), recompute))
        y, h_n, c_n = (torch.stack(results) for results in zip(*found, strict=True))
    y = _of_all_blocks(y.view(*y.shape[:2], h_0.shape[1], units))  # [N, D, H]
    return y.flatten(1), _of_all_blocks(h_n), _of_all_blocks(c_n)


def _weight_by_block(weight: Tensor, blocks: int, units: int) -> Tensor:
    """A weight or bias ``[G*H, *]`` -> ``[k, G*H/k, *]``"""
    return weight.view(-1, blocks, units, *weight.shape[1:]).transpose(0, 1).flatten(1, 2)


def _by_block(states: Tensor, blocks: int) -> Tensor:
    """``[*, *, H]`` -> ``[k, *, *, H/k]``"""
    return states.reshape(*states.shape[:2], blocks, states.shape[2] // blocks).movedim(2, 0)


def _of_all_blocks(states: Tensor) -> Tensor:
    """``[k, *, *, H/k]`` -> ``[*, *, H]``"""
    return states.movedim(0, 2).flatten(2)


def _steps(
    call: Call, x, weights, h_0, c_0, batch_sizes, norms, variant: Variant, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in plain torch operations, in the dtype that an operator would get."""

    def compute(x, weights, norms, h_0, c_0) -> tuple[Tensor, Tensor, Tensor]:
        of_layer = x, weights, norms, h_0, c_0, batch_sizes
        return option_ops.forward(call.cell, *of_layer, variant, call.transformed)

    again = recompute and modes.wants_gradients(x, h_0, c_0, *weights, *norms)
    return computed(compute, again, x, list(weights), list(norms), h_0, c_0)


def dropped(weights: Sequence[Tensor], parts: Parts, count: int) -> Sequence[Tensor]:
    """The weights of `count` layers and directions, in training with masks on every w_hh."""
    p, each = parts.cell_options.weight_dropout, len(weights) // count
    if not p or not parts.training:
        return weights
    return [
        (weight * cell_options.dropout_mask(p, weight.shape, weight)).to(weight.dtype) if k % each == 1 else weight
        for k, weight in enumerate(weights)
    ]


def _masked_rows(x: Tensor, mask: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """Rows ``[N, I]`` times the mask ``[B, I]`` of their sequence; nobody asks a GPU how long sequences are."""
    if batch_sizes is None:
        return (x.view(-1, *mask.shape) * mask).view(x.shape).to(x.dtype) if x.numel() else x
    row, ends = torch.arange(x.shape[0], device=batch_sizes.device), batch_sizes.cumsum(0)
    step = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
    sequence = (row - (ends - batch_sizes)[step]).clamp(max=mask.shape[0] - 1)  # rows behind the last step have none
    return (x * mask[sequence.to(mask.device, non_blocking=True)]).to(x.dtype)
