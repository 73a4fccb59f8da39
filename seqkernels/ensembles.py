"""torch.vmap over parameters alone, which is how an ensemble is called: prepared and run outside of torch.vmap.

Outside, a tensor's operations cost a fraction, and members of a few rows wait for little else. Every other call within
torch.vmap goes on, to operators that have rules for it (`seqkernels.batching`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import modes, ops, select, varlen
from seqkernels.batching import in_front
from seqkernels.checks import State
from seqkernels.inputs import prepare


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    batch_first: bool,
    bias: bool,
    recompute: bool,
    backend: str | None,
) -> tuple[Tensor, State] | None:
    """A call on a padded batch that members share, without dropout -> its results; None if it has to go on."""
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return None
    if not ops.ENSEMBLES or input.device.type != "cpu":
        return None
    states = () if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    if input.dim() != 3 or input.is_nested or not _only_weights_have_members(input, *states):
        return None
    functorch = torch._C._functorch
    members = [functorch._unwrap_batched(weight, 1) for weight in weights]
    size = next((weight.shape[dim] for weight, dim in members if dim is not None), None)
    if size is None:
        return None
    if num_layers > 1 and modes.wants_gradients(input, *states, *(weight for weight, _ in members)):
        return None  # some layers may be frozen
    outer = functorch.pop_dynamic_layer_stack()
    try:
        inputs = prepare(cell, input, hx, weights, num_layers, directions, batch_first, bias=bias)
        plan = select.plan_of(inputs.call, input.device, backend)
        stacked = [in_front(weight, dim, size) for weight, dim in members]
        wanted = modes.wants_gradients(inputs.rows.data, inputs.h_0, inputs.c_0, *stacked)
        if plan.backend not in ops.ENSEMBLES:
            return None
        x, h_0 = in_front(inputs.rows.data, None, size), in_front(inputs.h_0, None, size)
        c_0 = None if inputs.c_0 is None else in_front(inputs.c_0, None, size)
        plan = plan._replace(backend=ops.ENSEMBLES[plan.backend])
        y, h_n, c_n = ops.recurrence_forward(plan, inputs.call, x, stacked, h_0, c_0, None, wanted, recompute)
        y = y.view(size, *varlen.steps_and_sequences(input, batch_first), y.shape[2])
        y = y.transpose(1, 2) if batch_first else y
    finally:
        functorch.push_dynamic_layer_stack(outer)
    output, h = functorch._add_batch_dim(y, 0, 1), functorch._add_batch_dim(h_n, 0, 1)
    return output, h if c_0 is None else (h, functorch._add_batch_dim(c_n, 0, 1))


def _only_weights_have_members(*others: object) -> bool:
    """Whether a torch.vmap is the only thing around a call, and `others` are tensors without members."""
    functorch = torch._C._functorch
    if torch.autograd.forward_ad._current_level >= 0 or functorch.maybe_current_level() != 1:
        return False
    if torch._C._is_any_autocast_enabled() or torch._C._get_tracing_state() is not None:
        return False
    if functorch.peek_interpreter_stack().key() != functorch.TransformType.Vmap:
        return False
    return all(isinstance(other, Tensor) and not functorch.is_functorch_wrapped_tensor(other) for other in others)
