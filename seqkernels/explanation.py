"""explain: what would run, and why, for one module and for all of a model."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from seqkernels import (
    cell_modules,
    drop_in,
    functional,
    inputs,
    modules,
    quantized,
    select,
    swappable,
    trial,
    with_options,
)
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State

_NONE: Any = MappingProxyType({})


class Explained(NamedTuple):
    """What one recurrent module of a model would run."""

    name: str  # as in named_modules; "" is the model itself
    cls: str
    plan: select.Plan | None  # None: nothing of ours can run
    note: str = ""  # then why; or that it is a module of torch.nn, whose drop-in would run so

    def __str__(self) -> str:
        plan = str(self.plan).splitlines()[0] if self.plan else ""
        return f"{self.name or '(the model itself)'} ({self.cls}): {self.note}{plan}"


class Explanation(list[Explained]):
    """One line for each recurrent module of a model."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no RNN, GRU, LSTM or cell in it"


def explain(module: nn.Module, *args, **kwargs) -> select.Plan | Explanation:
    """Which backend, and which of its kernels, would run a module, and why not the others.

    Args:
        module: a layer or cell, ours, quantized or not, or torch.nn's, for which the answer is that of its drop-in; or
            a model.
        args, kwargs: what it would be called with: for a layer `input`, `hx`, `lengths`, `reset`, `reset_to` and
            `return_all_states`, as in its forward. A model is run on them, with its random numbers and its buffers as
            they were afterwards. Without any, the answer is what holds for inputs of any size.

    Returns:
        For a layer or cell with its input the plan, which says more of the other backends: nothing is run. For a model,
        or without an input, one line for each recurrent module; of a model's input, for each different plan.

    Raises:
        TypeError: `module` is no module, or is called with an input and has no recurrent one in it.
        ValueError, RuntimeError: as the module itself, for what does not fit, and where the backend that is forced
            cannot run.
    """
    drop_in.check_module(module, "explain takes a module")
    if not args and not kwargs:
        return Explanation(_explained(name, found) for name, found in _recurrent_in(module))
    if _explains(module):
        return _plan(module, *args, **kwargs)
    return _explained_run(module, args, kwargs)


def _recurrent_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _explains(module):
            yield name, module


def _explains(module: nn.Module) -> bool:
    return modules.is_recurrent(module) or isinstance(module, quantized.Quantized)


def _plan(module: Any, *args, **kwargs) -> select.Plan:
    """The plan of one layer or cell on its input."""
    is_layer = isinstance(module, (nn.RNNBase, quantized.QuantizedLayer))
    unknown = [] if is_layer else sorted(kwargs.keys() - {"input", "hx"})
    if unknown:
        raise TypeError(f"a cell takes input and hx, got {', '.join(unknown)}")
    of_module = quantized.plan_of if isinstance(module, quantized.Quantized) else _plan_of
    return of_module(module, *args, **kwargs)


def _plan_of(
    module: Any,
    input,
    hx: State | None = None,
    *,
    lengths=None,
    reset=None,
    reset_to=None,
    return_all_states: bool | None = None,
) -> select.Plan:
    if isinstance(module, nn.RNNBase):
        directions, weights = 2 if module.bidirectional else 1, drop_in.parameters(module, module._flat_weights_names)
        sizes = module.num_layers, directions, module.batch_first
        ragged = lengths, None, None, reset, reset_to
        cell, options = cell_modules.cell_of(module), getattr(module, "cell_options", None)
        blocks = options.blocks if options else 1
        all_states = getattr(module, "return_all_states", False) if return_all_states is None else return_all_states
        backend = getattr(module, "backend", None)
        more: dict[str, Any] = {"bias": module.bias, "blocks": blocks, "backend": backend}
        more["pieces"] = not (options or all_states)
        made = inputs.prepare(cell, input, hx, weights, *sizes, *ragged, **more)
        parts = with_options.made_of(options, (), module.training, module.proj_size > 0) if options else None
        dropout, recompute = module.dropout if module.training else 0.0, getattr(module, "recompute", False)
        if all_states:  # layer by layer
            plan = functional.plan_of(made, parts, backend)
        else:
            plan, _ = functional.planned(made, weights, dropout, recompute, parts, backend)
        if made.rows.anew is None:
            return plan
        how = "pieces side by side" if made.rows.pieces is None else "from piece to piece"
        return plan._replace(kernel=f"{plan.kernel}, {how}" if plan.kernel else how)
    else:
        states = (hx,) if isinstance(hx, torch.Tensor) else hx
        of_step = cell_modules.inputs_of_step(module, input, states)
        call = inputs.facts_of_step(cell_modules.cell_of(module), *of_step)[0]
    return select.plan_of(call, input.data.device, getattr(module, "backend", None))


def _class_of(module: Any) -> str:
    if isinstance(module, quantized.Quantized):
        return f"seqkernels.{module._get_name()}"
    return f"{'seqkernels' if isinstance(type(module), drop_in.DropIn) else 'torch.nn'}.{type(module).__name__}"


def _explained(name: str, module: Any, args: tuple = (), kwargs: dict = _NONE) -> Explained:
    if isinstance(module, quantized.Quantized):
        return Explained(name, _class_of(module), quantized.PLAN)
    ours, cls = isinstance(type(module), drop_in.DropIn), _class_of(module)
    if "forward" in vars(module):
        return Explained(name, cls, None, "its forward was replaced, and decides")
    if cell_modules.cell_of(module) not in CELLS:
        return Explained(name, cls, None, "a class of its own")
    try:
        plan = _plan(module, *args, **kwargs) if args or kwargs else swappable.plan_without_sizes(module)
    except ValueError as error:
        return Explained(name, cls, None, str(error))
    return Explained(name, cls, plan, "" if ours else "not swapped in; its drop-in: ")


def _explained_run(model: nn.Module, args: tuple, kwargs: dict) -> Explanation:
    """What each recurrent module of a model runs when the model is called."""
    recurrent = dict(_recurrent_in(model))
    if not recurrent:
        raise TypeError(f"explain takes an RNN, GRU, LSTM, a cell, or a model with one, got {type(model).__name__}")
    heard: list[Explained] = []
    trial.listen(model, recurrent, args, kwargs, lambda *call: heard.append(_explained(*call)))
    called = {explained.name for explained in heard}
    idle = [
        Explained(name, _class_of(module), None, "not called with this input")
        for name, module in recurrent.items()
        if name not in called
    ]
    return Explanation(dict.fromkeys(heard + idle))
