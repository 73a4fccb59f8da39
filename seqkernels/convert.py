"""Swapping: torch.nn's recurrent modules become ours and back, in place, with everything that hangs on them."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from seqkernels import modules

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
        return (
            f"{where}: {self.before} -> {self.after}" if self.after else f"{where}: {self.before} left, {self.reason}"
        )


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
    several parents and references from elsewhere are untouched. A subclass of nn.GRU (other than a parametrized one)
    has code of its own that we do not know; it is left, and the report says so.
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
        if base in classes:
            module.__class__ = classes[base] if base is before else _rebased(before, classes[base])
            # torch.nn's flat list of weights is a copy that ours does without.
            module.__dict__.pop("_flat_weights", None)
            if isinstance(module, tuple(_OURS)) and isinstance(module, nn.RNNBase):
                module._init_flat_weights()
            report.append(Swap(name, _name(before), _name(type(module))))
        elif isinstance(module, tuple(classes)):
            report.append(Swap(name, _name(before), None, "a subclass may compute something else"))
    return report


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
    """
    # Dynamo refuses instances of whatever torch.nn.GRU is at that moment, unless this flag is set.
    import torch._dynamo.config

    places = (nn, nn.modules, nn.modules.rnn)
    before = [(place, name.__name__, getattr(place, name.__name__)) for place in places for name in _OURS]
    with torch._dynamo.config.patch(allow_rnn=True):
        for torchs, ours in _OURS.items():
            for place in places:
                setattr(place, torchs.__name__, ours)
        try:
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)
