"""Swapping: torch.nn's recurrent modules become ours and back, in place, with their hooks and parametrizations."""

import fnmatch
import functools
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from seqkernels import swappable, trial
from seqkernels.drop_in import DropIn, check_module
from seqkernels.swappable import OURS, TORCHS


class Swap(NamedTuple):
    """One module of a report."""

    name: str  # as in named_modules; "" is the model itself
    before: str
    after: str | None  # None: left as it was
    reason: str = ""  # why it was left
    speed: float | None = None  # ours as a multiple of torch.nn's, where a benchmark was asked for

    def __str__(self) -> str:
        where = self.name or "(the model itself)"
        speed = "" if self.speed is None else f" ({self.speed:.2f} times as fast as torch.nn's)"
        return f"{where}: {self.before} " + (f"-> {self.after}" if self.after else f"left: {self.reason}") + speed


class Report(list[Swap]):
    """What was swapped and what was left, one `Swap` for each recurrent module; `seen` modules in all."""

    seen = 0

    @property
    def swapped(self) -> list[Swap]:
        return [swap for swap in self if swap.after]

    @property
    def left(self) -> list[Swap]:
        return [swap for swap in self if not swap.after]

    def __str__(self) -> str:
        if not self:
            return f"0 swapped, 0 left: no RNN, GRU, LSTM or cell among {self.seen} modules"
        return "\n".join([f"{len(self.swapped)} swapped, {len(self.left)} left", *(f"  {swap}" for swap in self)])


def swap_in(
    model: nn.Module,
    *,
    classes: type | Iterable[type] | None = None,
    names: str | Iterable[str] | None = None,
    cells: bool | None = None,
    subclasses: bool = False,
    benchmark: Any = None,
) -> Report:
    """Make every nn.RNN, GRU, LSTM and cell in `model`, itself included, one of ours; returns a report.

    Objects stay the same, only their class changes: parameters, hooks, parametrizations, the training flag, places in
    several parents and references from elsewhere are untouched.

    Args:
        model: any module.
        classes: which of torch.nn.RNN, GRU, LSTM, RNNCell, GRUCell and LSTMCell to swap; None for all.
        names: patterns of the names to swap, as `model.named_modules()` has them, with the wildcards of `fnmatch`:
            "encoder.*" or ["rnn", "heads.?.lstm"]; None for all.
        cells: False leaves cells as they are. None warns of those that are swapped on a CPU, where a loop of torch.nn's
            is mostly faster, unless `classes` names theirs or `benchmark` times them.
        subclasses: True swaps a subclass of nn.GRU, say, as well, if it changes only how it is made, or adds methods.
            It stays an instance of its class, which torch.compile refuses as before.
        benchmark: an example input of `model`, or a tuple of its positional arguments. The model is called once, each
            module is timed both ways where it is called (with a backward pass, if gradients are on), and those that
            are not faster as ours are left; the report has the speeds.

    Left as they are, with the reason in the report: a subclass that is not asked for, and always one with code of its
    own for what ours does, as `forward`; a module whose `forward` has been replaced (by accelerate's hooks,
    profilers); modules of TorchScript and of torch.ao; and one that no backend here runs, of complex numbers say.

    Raises:
        TypeError: `model` is no module; one of `names` is no string.
        ValueError: one of `classes` is none of the six.
    """
    _check_model(model, "swap_in")
    wanted = _Wanted(_chosen(classes, cells), _patterns(names), subclasses)
    report, able = _look_through(model, wanted)
    speeds = {} if benchmark is None else _speeds(model, able, benchmark)
    for place, swap in enumerate(report):
        if swap.reason:
            continue
        speed = speeds.get(swap.name)
        if benchmark is not None and speed is None:
            report[place] = swap._replace(reason="the example does not call it")
        elif speed is not None and speed <= 1:
            report[place] = swap._replace(reason="it is not faster as ours", speed=speed)
        else:
            report[place] = _swap(swap.name, *able[swap.name])._replace(speed=speed)
    if cells is None and classes is None and benchmark is None:
        _warn_of_cells(model, report)
    return report


class _Wanted(NamedTuple):
    """What is asked for, by the arguments of `swap_in`."""

    classes: tuple[type, ...]
    names: tuple[str, ...] | None  # patterns
    subclasses: bool

    def reason_against(self, name: str, module: Any, torchs: type) -> str | None:
        if torchs not in self.classes:
            return "its class was not asked for"
        if self.names is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.names):
            return "its name was not asked for"
        return (
            swappable.reason_against_class(module, torchs, self.subclasses)
            or swappable.reason_against_forward(module)
            or swappable.unsupported(module)
        )


def _chosen(classes: type | Iterable[type] | None, cells: bool | None) -> tuple[type, ...]:
    several = isinstance(classes, Iterable) and not isinstance(classes, str)
    chosen: tuple = tuple(OURS) if classes is None else tuple(classes) if several else (classes,)  # type: ignore[arg-type]
    for cls in chosen:
        if cls not in OURS:
            raise ValueError(f"classes are some of torch.nn's {', '.join(cls.__name__ for cls in OURS)}, got {cls!r}")
    return tuple(cls for cls in chosen if cls not in swappable.CELLS) if cells is False else chosen


def _patterns(names: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if names is None or isinstance(names, str):
        return names if names is None else (names,)
    patterns: tuple = tuple(names) if isinstance(names, Iterable) and not isinstance(names, type) else (names,)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"names are patterns, which are strings, got {pattern!r}")
    return patterns


def _look_through(model: nn.Module, wanted: _Wanted) -> tuple[Report, dict[str, tuple[nn.Module, type]]]:
    """A report in which nothing is swapped yet, and by their names the modules that can be, with their new classes."""
    report, able = Report(), {}
    for report.seen, (name, module) in enumerate(model.named_modules(), 1):
        torchs = swappable.torchs_class(module)
        reason = wanted.reason_against(name, module, torchs) if torchs else swappable.reason_against_kind(module)
        if torchs or reason:
            report.append(Swap(name, _name(type(module)), None, reason or ""))
        if torchs and not reason:
            able[name] = module, _drop_in_of(swappable.unparametrized(module), torchs)
    return report, able


def _speeds(model: nn.Module, able: dict[str, tuple[nn.Module, type]], benchmark: Any) -> dict[str, float]:
    """How many times as fast modules are as ours, where the model calls them for the first time."""
    speeds: dict[str, float] = {}

    def hear(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if name not in speeds:
            ours = object.__new__(type(module))  # the same parameters, and nothing that pickle would have a say in
            ours.__dict__ = module.__dict__.copy()
            _swap(name, ours, able[name][1])
            speeds[name] = trial.compare(module, ours, args, kwargs)

    args = benchmark if type(benchmark) is tuple else (benchmark,)
    trial.listen(model, {name: module for name, (module, _) in able.items()}, args, {}, hear)
    return speeds


def swap_out(model: nn.Module) -> Report:
    """Undo `swap_in`: every module of ours in `model` becomes torch.nn's again; returns a report.

    Raises:
        TypeError: `model` is no module.
    """
    _check_model(model, "swap_out")
    report = Report()
    for report.seen, (name, module) in enumerate(model.named_modules(), 1):
        cls = swappable.unparametrized(module)
        torchs = vars(cls).get("_subclass_of_torch") or TORCHS.get(cls)
        if torchs is not None:
            reason = swappable.reason_against_forward(module) or swappable.reason_against_options(module)
        elif isinstance(cls, DropIn):
            reason = "torch.nn has no such class"
        else:
            reason = "it is none of ours" if swappable.torchs_class(module) else swappable.reason_against_kind(module)
        if reason:
            report.append(Swap(name, _name(type(module)), None, reason))
        elif torchs is not None:
            report.append(_swap(name, module, torchs))
    return report


def _check_model(model: object, function: str) -> None:
    check_module(model, f"{function} takes a model, which is one torch.nn.Module")


def _warn_of_cells(model: nn.Module, report: Report) -> None:
    """By the rows of benchmarks/results/models.jsonl: a call of ours passes more Python."""
    swapped = {swap.name: model.get_submodule(swap.name) for swap in report.swapped}
    cells = {name: module for name, module in swapped.items() if isinstance(module, nn.RNNCellBase)}
    slow = [name for name, cell in cells.items() if cell.weight_hh.device.type == "cpu"]
    if slow:
        names = ", ".join(map(repr, slow))
        warnings.warn(
            f"on a CPU a loop of torch.nn's cells is mostly faster than one of ours, which {names} became; cells=False "
            "leaves them, and cells=True says that they are wanted",
            stacklevel=3,
        )


@functools.cache
def _drop_in_of(cls: type, torchs: type) -> type:
    """Our class in the place of one of torch.nn's; for a subclass of that, a subclass of it that computes as ours do.

    Pickle finds the latter by the subclass. Its members are copies: with ours for a base, Python would not let every
    object become one, not those of abstract classes.
    """

    if cls is torchs:
        return OURS[torchs]

    def __reduce_ex__(self, protocol):
        _, _, *rest = super(made, self).__reduce_ex__(protocol)
        return _new_drop_in_of, (cls, torchs), *rest

    ours = [base for base in OURS[torchs].__mro__ if isinstance(base, DropIn)]
    left_out = _OF_A_CLASS | {name for name in swappable.ADDED if hasattr(cls, name)}
    members = {name: value for base in reversed(ours) for name, value in vars(base).items() if name not in left_out}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    members |= names | {"__reduce_ex__": __reduce_ex__, "_drop_in": OURS[torchs], "_subclass_of_torch": cls}
    meta: Any = DropIn if type(cls) is type else type("DropIn", (DropIn, type(cls)), {})
    made: Any = meta(cls.__name__, (cls,), members)
    return made


_OF_A_CLASS = {*swappable.HARMLESS, "__dict__", "__weakref__", "__annotations__", "__annotations_cache__"}


def _new_drop_in_of(cls: type, torchs: type) -> nn.Module:
    made = _drop_in_of(cls, torchs)
    return made.__new__(made)  # type: ignore[call-overload]


def _swap(name: str, module: nn.Module, to: type) -> Swap:
    """Change the class of one module."""
    before, base = type(module), swappable.unparametrized(module)
    assigned = _take_flat_weights(module)
    module.__class__ = to if base is before else _rebased(before, to)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
        for index, weight in assigned.items():
            module._flat_weights[index] = weight
    return Swap(name, _name(before), _name(type(module)))


def _take_flat_weights(module: nn.Module) -> dict[int, Tensor | None]:
    """Removes what a layer keeps beside its parameters: ours needs none of it, and torch.nn makes it again. Returns the
    weights that were put into `_flat_weights` in place of a parameter, by their place there."""
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
    if subclass := vars(cls).get("_subclass_of_torch"):
        return f"{_name(cls._drop_in)} as {_name(subclass)}"  # type: ignore[attr-defined]
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}"
