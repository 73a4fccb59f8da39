"""A plain layer on a padded batch, or a cell, on a CPU: a short way for calls of some ten microseconds.

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

from seqkernels import checks, direct, drop_in, hardware, kept_weights, late_checks, modes, ops, ranges, select
from seqkernels.backends import autocast, cpu
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State
from seqkernels.hardware import Machine

if TYPE_CHECKING:
    from seqkernels.cell_modules import _Cell
    from seqkernels.modules import _Recurrent

_any_autocast = torch._C._is_any_autocast_enabled


def run(
    layer: "_Recurrent", input: Tensor | PackedSequence, hx: State | None, one_step: bool = False
) -> tuple[Tensor, State] | None:
    """What a layer gives for input ``[T, B, I]`` (with batch_first ``[B, T, I]``), or for one step ``[B, I]`` of a
    stream; None: it has to go the long way."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or _does_more(layer):
        return None
    if not input.is_cpu or layer.backend not in (None, "cpu"):
        return None
    unseen = direct.unseen()
    if _is_watched(unseen) or ("parametrizations" in layer._modules and _goes_back(layer, unseen, one_step)):
        return None
    cell, directions = layer.mode.lower(), 2 if layer.bidirectional else 1
    parts = hardware.bfloat16_parts(input.device, input.dtype) if hardware.THIS_MACHINE.splits_float32 else 0
    facts = cell, input.dtype, layer.num_layers, directions, parts
    try:
        plan, call = _planned(*facts, layer.backend, hardware.THIS_MACHINE)
    except ValueError:
        return None
    if plan.backend != "cpu":
        return None
    weights = layer._weights()
    if (
        input.is_nested
        or input.dim() != (2 if one_step else 3)
        or len(weights) != layer.num_layers * directions * _each(layer)
    ):
        return None
    states: tuple[Tensor, ...] = ()
    if hx is not None:
        states = tuple(hx) if CELLS[cell].states == 2 and isinstance(hx, (tuple, list)) else (hx,)  # type: ignore[assignment]
        if len(states) != CELLS[cell].states or any(type(state) is not Tensor for state in states):
            return None
    late_checks.look()
    if torch.is_grad_enabled():
        if checks.any_expanded(weights):
            return None
        if modes.wants_gradients(input, *states, *weights):
            return None if one_step else _with_gradients(layer, plan, call, input, states, weights)
    if not unseen:
        return None
    launch = kept_weights.launch_of(layer, cpu.as_among_others(plan.launch) if one_step else plan.launch)
    sizes = directions, layer.hidden_size, layer.proj_size
    found = direct.layer(cell, input, tuple(states), weights, layer.num_layers, *sizes, layer.batch_first, launch)
    if not found:
        return None
    return found[0], found[1] if len(found) == 2 else (found[1], found[2])


def run_cell(
    module: "_Cell", cell: str, names: Sequence[str], x: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """h, or h and c ``[B, H]``, of a cell's step from x ``[B, I]`` (or all without B), without states from zeros;
    names: its weights. None: it has to go the long way."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or module.backend not in (None, "cpu") or x.is_nested:
        return None
    if x.dim() != 2:
        return _run_unbatched(module, cell, names, x, states)
    for state in states:
        if type(state) is not Tensor or state.dim() != 2:
            return None
    unseen, casts = direct.unseen(but_autocast=True), _any_autocast()
    if not x.is_cpu or _is_watched(unseen, but_autocast=True) or "parametrizations" in module._modules:
        return None
    if casts and (x.dtype == torch.float64 or not torch.is_autocast_enabled("cpu")):
        return None
    dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
    parts = hardware.bfloat16_parts(x.device, dtype) if hardware.THIS_MACHINE.splits_float32 else 0
    try:
        plan, _ = _planned(cell, dtype, 1, 1, parts, module.backend, hardware.THIS_MACHINE)
    except ValueError:
        return None
    if plan.backend != "cpu":
        return None
    late_checks.look()
    weights, wanted = drop_in.parameters(module, names), torch.is_grad_enabled()
    if wanted and checks.any_expanded(weights):
        return None
    wanted = wanted and modes.wants_gradients(x, *states, *weights)
    if not (wanted or unseen):
        return None
    packs = not wanted and hardware.THIS_MACHINE.isa == "amx"  # without tiles one step packs no weights
    launch = kept_weights.launch_of(module, plan.launch) if packs else plan.launch
    if not casts:
        return _step(launch, cell, x, states, weights, module.hidden_size, wanted)
    x, states, weights = autocast.cast((x, states, weights), dtype, "cpu")
    torch.set_autocast_enabled("cpu", False)
    try:
        return _step(launch, cell, x, states, weights, module.hidden_size, wanted)
    finally:
        torch.set_autocast_enabled("cpu", True)


def _run_unbatched(
    module: "_Cell", cell: str, names: Sequence[str], x: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    if x.dim() != 1 or any(type(state) is not Tensor or state.dim() != 1 for state in states):
        return None
    found = run_cell(module, cell, names, x.unsqueeze(0), [state.unsqueeze(0) for state in states])
    return found and tuple(state.squeeze(0) for state in found)


def _step(
    launch: tuple[int, ...],
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    hidden_size: int,
    wanted: bool,
) -> tuple[Tensor, ...] | None:
    if wanted:
        if not states:
            states = [x.new_zeros(x.shape[0], hidden_size)] * CELLS[cell].states
        h_0, c_0 = states[0], states[1] if len(states) == 2 else None
        try:
            found = ops.step_of_cell(launch, cell, x, h_0, c_0, *weights)
        except (RuntimeError, ValueError):
            return None
        return (found,) if c_0 is None else found
    results = direct.layer(cell, x, tuple(states), weights, 1, 1, hidden_size, 0, None, launch)
    return tuple(results) if results else None


def _with_gradients(
    layer: "_Recurrent",
    plan: select.Plan,
    call: Call,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, State] | None:
    if layer.num_layers > 1:  # some of which may be frozen
        return None
    if not (input.is_cpu and input.numel() and input.dtype == weights[0].dtype):
        return None
    sequences, size = input.shape[0 if layer.batch_first else 1], layer.hidden_size
    shapes = [(call.directions, sequences, layer.proj_size or size), (call.directions, sequences, size)]
    shapes = shapes[: CELLS[call.cell].states]
    if not states:
        states = [input.new_zeros(shape) for shape in shapes]
    elif [state.shape for state in states] != shapes:
        return None
    h_0, c_0 = states[0], states[1] if len(states) == 2 else None
    try:
        y, h_n, c_n = ops.of_padded(plan, call, input, weights, h_0, c_0, layer.batch_first)
    except (RuntimeError, ValueError):
        return None
    return y, h_n if c_0 is None else (h_n, c_n)


def _each(layer: "_Recurrent") -> int:
    """How many weights a direction has."""
    return (4 if layer.bias else 2) + (layer.proj_size > 0)


def _does_more(layer: "_Recurrent") -> bool:
    more = layer.cell_options is not None or layer.learn_initial_state or layer.return_all_states
    return more or layer.recompute is not False or (layer.training and layer.dropout > 0)


def _goes_back(layer: "_Recurrent", unseen: bool, one_step: bool) -> bool:
    """Whether the call might go the long way after its weights were read: parametrized ones, which may draw or count,
    are to be computed once."""
    return one_step or layer.num_layers > 1 if torch.is_grad_enabled() else not unseen


def _is_watched(unseen: bool, but_autocast: bool = False) -> bool:
    """Whether somebody takes part in the call: a transform, a trace, autocast (unless it may), the log. Not modes and
    profilers alone: torch.utils.checkpoint may repeat under them what ran without, and expects that the same is saved
    for gradients."""
    if torch.autograd.forward_ad._current_level >= 0 or ranges.ON or select.logs():
        return True
    if unseen:
        return False
    traced = torch._C._get_tracing_state() is not None or (_any_autocast() and not but_autocast)
    return traced or modes.transformed()


@functools.lru_cache(256)
def _planned(
    cell: str, dtype: torch.dtype, layers: int, directions: int, parts: int, backend: str | None, machine: Machine
) -> tuple[select.Plan, Call]:
    """As `modes.facts_of` and `select.plan_of`, which take longer than looking up here what they gave."""
    call = Call(cell, "cpu", dtype, False, False, layers, directions, bfloat16_parts=parts)
    return select.plan(call, machine, backend), call
