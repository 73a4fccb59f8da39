"""A plain layer on a padded batch, on a CPU: a short way for calls of some ten microseconds.

Python that is spread over many functions costs such a call more than its arithmetic: the weights that a call reads push
it out of the caches. Here stands what the long way (`seqkernels.functional.recurrent`) does with such a call, and no
more. Whatever is not plain takes the long way, and so does what the operator refuses: there errors are torch.nn's.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, hardware, late_checks, modes, ops, select
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State
from seqkernels.hardware import Machine

if TYPE_CHECKING:
    from seqkernels.modules import _Recurrent


def run(layer: "_Recurrent", input: Tensor | PackedSequence, hx: State | None) -> tuple[Tensor, State] | None:
    """What a layer gives for input ``[T, B, I]`` (with batch_first ``[B, T, I]``); None: it has to go the long way."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or _does_more(layer) or _is_watched():
        return None
    weights = layer._weights()
    if not (input.is_cpu and input.dim() == 3 and input.numel() and input.dtype == weights[0].dtype) or input.is_nested:
        return None
    late_checks.look()
    cell, directions, size = layer.mode.lower(), 2 if layer.bidirectional else 1, layer.hidden_size
    time_major = input.transpose(0, 1) if layer.batch_first else input
    steps, sequences, features = time_major.shape
    count, projected = layer.num_layers * directions, layer.proj_size
    shapes = [(count, sequences, projected or size), (count, sequences, size)][: CELLS[cell].states]
    states: Sequence[Tensor]
    if hx is None:
        states = [input.new_zeros(shape) for shape in shapes]
    else:
        states = hx if len(shapes) == 2 and isinstance(hx, (tuple, list)) else (hx,)  # type: ignore[assignment]
        if [state.shape if type(state) is Tensor else None for state in states] != shapes:
            return None
    if len(weights) != count * ((4 if layer.bias else 2) + (projected > 0)) or checks.any_expanded(weights):
        return None
    wanted = modes.wants_gradients(input, *states, *weights)
    if wanted and layer.num_layers > 1:  # some of which may be frozen
        return None
    h_0, c_0 = states[0], states[1] if len(states) == 2 else None
    rows = time_major.reshape(steps * sequences, features)
    parts = hardware.bfloat16_parts(input.device, input.dtype) if hardware.THIS_MACHINE.splits_float32 else 0
    facts = cell, input.dtype, layer.num_layers, directions, parts
    try:
        plan, call = _planned(*facts, layer.backend, hardware.THIS_MACHINE)
        if plan.backend != "cpu":  # what others are told depends on sizes
            return None
        y, h_n, c_n = ops.recurrence_forward(plan, call, rows, weights, h_0, c_0, None, wanted)
    except (RuntimeError, ValueError):
        return None
    y = y.view(steps, sequences, y.shape[1])
    return y.transpose(0, 1) if layer.batch_first else y, h_n if c_0 is None else (h_n, c_n)


def _does_more(layer: "_Recurrent") -> bool:
    more = layer.cell_options is not None or layer.learn_initial_state or layer.return_all_states
    return more or layer.recompute is not False or (layer.training and layer.dropout > 0)


def _is_watched() -> bool:
    """Whether somebody takes part in the call: a transform, a trace, the log."""
    return modes.transformed() or torch._C._get_tracing_state() is not None or select.logs()


@functools.lru_cache(256)
def _planned(
    cell: str, dtype: torch.dtype, layers: int, directions: int, parts: int, backend: str | None, machine: Machine
) -> tuple[select.Plan, Call]:
    """As `modes.facts_of` and `select.plan_of`, which take longer than looking up here what they gave."""
    call = Call(cell, "cpu", dtype, False, False, layers, directions, bfloat16_parts=parts)
    return select.plan(call, machine, backend), call
