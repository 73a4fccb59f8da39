"""Swapping: torch.nn's recurrent modules become ours and back, in place, with everything that hangs on them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from seqkernels import drop_in, modules

# torch.nn's classes are taken here once: inside patch_torch() the names in torch.nn mean ours.
_OURS = {getattr(nn, name): getattr(modules, name) for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


class Swap(NamedTuple):
    """One module of a report."""

    name: str  # as in named_modules; "" is the model itself
    before: str
    after: str | None  # None: left as it was
    reason: str = ""  # why it was left

    def __str__(self) -> str:
        where = self.name or "(the model itself)"
        return f"{where}: {self.before} " + (f"-> {self.after}" if self.after else f"left: {self.reason}")


class Report(list[Swap]):
    """What was swapped and what was left, one `Swap` a module."""

    @property
    def swapped(self) -> list[Swap]:
        return [swap for swap in self if swap.after]

    @property
    def left(self) -> list[Swap]:
        return [swap for swap in self if not swap.after]

    def __str__(self) -> str:
        return "\n".join([f"{len(self.swapped)} swapped, {len(self.left)} left", *(f"  {swap}" for swap in self)])


def swap_in(model: nn.Module) -> Report:
    """Make every nn.RNN, GRU, LSTM and cell in `model`, itself included, one of ours; returns a report.

    Objects stay the same, only their class changes: parameters, hooks, parametrizations, the training flag, places in
    several parents and references from elsewhere are untouched. Left as they are, with the reason in the report: a
    subclass of nn.GRU (other than a parametrized one), which has code of its own; a module whose `forward` somebody has
    replaced (accelerate's hooks, profilers); and one that no backend here runs, of complex numbers say.
    """
    return _swap(model, _OURS)


def swap_out(model: nn.Module) -> Report:
    """Undo `swap_in`: every module of ours in `model` becomes torch.nn's again; returns a report."""
    return _swap(model, _TORCHS)


def _swap(model: nn.Module, classes: dict[type, type]) -> Report:
    report = Report()
    for name, module in model.named_modules():
        before = type(module)
        base = before.__bases__[0] if hasattr(module, "parametrizations") else before
        if base not in classes:
            if isinstance(module, tuple(classes)):
                report.append(Swap(name, _name(before), None, "a subclass may compute something else"))
            continue
        reason = _reason_to_leave(module, classes)
        if reason is None:
            assigned = _take_flat_weights(module)
            module.__class__ = classes[base] if base is before else _rebased(before, classes[base])
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
                for index, weight in assigned.items():
                    module._flat_weights[index] = weight
        report.append(Swap(name, _name(before), None if reason else _name(type(module)), reason or ""))
    return report


def _reason_to_leave(module, classes: dict[type, type]) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced"
    return modules.unsupported(module) if classes is _OURS else None


def _take_flat_weights(module: nn.Module) -> dict[int, Tensor | None]:
    """Takes away what a layer keeps beside its parameters: ours needs none of it, and torch.nn makes it anew. Returns
    the weights that somebody has put into `_flat_weights` to be used in place of a parameter, by their place there."""
    if not isinstance(module, nn.RNNBase):
        return {}
    flat, names = module._flat_weights, module._flat_weights_names
    # A parametrized weight is another tensor whenever it is asked for.
    named = {i: name for i, name in enumerate(names) if not isinstance(getattr(type(module), name, None), property)}
    assigned = {i: flat[i] for i, name in named.items() if flat[i] is not getattr(module, name, None)}
    for kept in ("_flat_weights", "_flat_weight_refs", "_assigned_weights"):
        vars(module).pop(kept, None)
    return assigned


def _rebased(parametrized: type, base: type) -> type:
    """The class that torch.nn.utils.parametrize made for one module, with another base."""
    members = {k: v for k, v in vars(parametrized).items() if k not in ("__dict__", "__weakref__", "__module__")}
    return type(f"Parametrized{base.__name__}", (base,), members | {"__module__": base.__module__})


def _name(cls: type) -> str:
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"


@contextlib.contextmanager
def patch_torch() -> Iterator[None]:
    """Inside, torch.nn.RNN, GRU, LSTM and their cells are ours, for code that makes its modules by those names.

    Modules made inside stay ours afterwards. Names that were imported before (`from torch.nn import GRU`) are not
    reached; use `swap_in` for those. Contexts may be nested; they change torch.nn for all threads.

    `torch.nn.modules.rnn`, where pickle looks classes up, stays as it is, so that models of torch.nn can be saved and
    loaded inside. There `isinstance(module, torch.nn.GRU)` is true of ours and of torch.nn's own; outside it is torch's
    question again, and false of ours. A name that is imported inside (`from torch.nn import GRU`) stays ours.
    """
    # Dynamo refuses instances of whatever torch.nn.GRU is at that moment, unless this flag is set.
    import torch._dynamo.config

    places = (nn, nn.modules)
    before = [(place, name.__name__, getattr(place, name.__name__)) for place in places for name in _OURS]
    with torch._dynamo.config.patch(allow_rnn=True), drop_in.counting_as(_TORCHS):
        for torchs, ours in _OURS.items():
            for place in places:
                setattr(place, torchs.__name__, ours)
        try:
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)
