"""patch_torch: torch.nn's names mean our modules for a while, for code that makes its own by them."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

from torch import nn

from seqkernels import drop_in
from seqkernels.swappable import OURS, TORCHS


class Built:
    """What was built while torch.nn's names meant ours: how many modules of each class.

    Attributes:
        ours: those of seqkernels.
        torchs: those of torch.nn all the same, whose classes were taken by `from torch.nn import GRU` before.
    """

    def __init__(self) -> None:
        self.ours: Counter[str] = Counter()
        self.torchs: Counter[str] = Counter()

    def add(self, module: nn.Module) -> None:
        cls = type(module)
        (self.ours if isinstance(cls, drop_in.DropIn) else self.torchs)[cls.__name__] += 1

    def __str__(self) -> str:
        lines = [f"built with seqkernels: {_listed(self.ours)}"]
        if self.torchs:
            lines.append(f"built with torch.nn: {_listed(self.torchs)}; {_REMEDY}")
        return "\n".join(lines)


_REMEDY = "their classes were taken before patch_torch (from torch.nn import ...): use swap_in(model)"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


class patch_torch(contextlib.ContextDecorator):
    """Inside, torch.nn.RNN, GRU, LSTM and their cells are ours, for code that makes its modules by those names.

        with sk.patch_torch() as built:
            model = third_party.Model()
        print(built)  # built with seqkernels: 2 GRU

    Modules made inside stay ours afterwards. Names that were imported before (`from torch.nn import GRU`) are not
    reached: what was made by them is listed as torch.nn's in what the context gives (`Built`); use `swap_in` for those.
    Where nothing of ours was made, a UserWarning says so on leaving, as it does of a `patch_torch()` without `with`.
    Contexts may be nested; they change torch.nn for all threads. It serves as a decorator as well.

    `torch.nn.modules.rnn`, where pickle looks classes up, stays as it is, so that models of torch.nn can be saved and
    loaded inside. There `isinstance(module, torch.nn.GRU)` is true of ours and of torch.nn's own; outside it is torch's
    question again, and false of ours. A name that is imported inside (`from torch.nn import GRU`) stays ours.
    """

    _used = True  # where __init__ was given arguments, and raised

    def __init__(self) -> None:
        self._entered: list[contextlib.AbstractContextManager] = []
        self._used = False

    def __enter__(self) -> Built:
        self._used = True
        context = _patched()
        built = context.__enter__()
        self._entered.append(context)
        return built

    def __exit__(self, *raised) -> bool | None:
        return self._entered.pop().__exit__(*raised)

    def __call__(self, function):
        self._used = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn("patch_torch() does nothing by itself: with patch_torch(): ...", stacklevel=2)


@contextlib.contextmanager
def _patched() -> Iterator[Built]:
    # Dynamo refuses instances of whatever torch.nn.GRU is at that moment, unless this flag is set.
    import torch._dynamo.config

    places = (nn, nn.modules)
    before = [(place, name.__name__, getattr(place, name.__name__)) for place in places for name in OURS]
    built = Built()
    with torch._dynamo.config.patch(allow_rnn=True), drop_in.counting_as(TORCHS), _listening(built):
        for torchs, ours in OURS.items():
            for place in places:
                setattr(place, torchs.__name__, ours)
        try:
            yield built
        finally:
            for place, name, value in before:
                setattr(place, name, value)
    if not built.ours:
        instead = f"{_listed(built.torchs)} of torch.nn; {_REMEDY}" if built.torchs else "nothing of torch.nn either"
        # Past this function, contextlib's, patch_torch's own, to the with statement.
        warnings.warn(f"inside patch_torch nothing was built with seqkernels, and {instead}", stacklevel=4)


@contextlib.contextmanager
def _listening(built: Built) -> Iterator[None]:
    """Inside, `built` hears of every layer and cell that is made."""
    bases = (nn.RNNBase, nn.RNNCellBase)
    before = [base.__init__ for base in bases]

    def telling(init: Callable) -> Callable:
        def __init__(self, *args, **kwargs) -> None:
            init(self, *args, **kwargs)
            built.add(self)

        return __init__

    for base, init in zip(bases, before, strict=True):
        base.__init__ = telling(init)  # type: ignore[misc]
    try:
        yield
    finally:
        for base, init in zip(bases, before, strict=True):
            base.__init__ = init  # type: ignore[misc]
