"""What can be swapped: which of torch.nn's classes a module is of, and why it is left as it is."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from seqkernels import hardware, modules, select
from seqkernels.backends.call import Call
from seqkernels.cell_modules import cell_of
from seqkernels.drop_in import DropIn
from seqkernels.quantized import Quantized

# torch.nn's classes are taken here once: inside patch_torch() the names in torch.nn mean ours.
OURS = {getattr(nn, name): getattr(modules, name) for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")}
TORCHS = {ours: torchs for torchs, ours in OURS.items()}
CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
_NAMES = {cls.__name__ for cls in OURS}


def torchs_class(module: nn.Module) -> type | None:
    """Which of torch.nn's six classes this is an instance of, as long as it is neither ours nor torch.ao's."""
    if isinstance(type(module), DropIn) or _is_of_ao(module):
        return None
    return next((cls for cls in OURS if isinstance(module, cls)), None)


def reason_against_kind(module: nn.Module) -> str | None:
    """Why what is recurrent, and no instance of torch.nn's six classes, is left; None: it is not recurrent."""
    if isinstance(type(module), DropIn):
        return "it is ours already"
    if isinstance(module, Quantized):
        return "it is quantized"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has its code" if getattr(module, "original_name", None) in _NAMES else None
    if _is_of_ao(module):
        return "it is quantized, or made to be" if type(module).__name__ in _NAMES else None
    return "it is a class of its own" if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) else None


def _is_of_ao(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.")


def unparametrized(module: nn.Module) -> type:
    cls = type(module)
    return cls.__bases__[0] if hasattr(module, "parametrizations") else cls


def reason_against_forward(module: nn.Module) -> str | None:
    return "its forward was replaced" if "forward" in vars(module) else None


def reason_against_options(module: nn.Module, other: str = "torch.nn", harmless: Sequence[str] = ()) -> str | None:
    """Which options of ours a module has that `other` has not; `harmless`: options that are no reason."""
    options = [name for name in ("return_all_states", "learn_initial_state") if getattr(module, name, False)]
    cell_options: Any = getattr(module, "cell_options", None)
    options += cell_options.given() if cell_options else []
    options = [name for name in options if name not in harmless]
    return f"{other} has no {' and no '.join(options)}" if options else None


def reason_against_class(module: nn.Module, torchs: type, subclasses: bool) -> str | None:
    cls = unparametrized(module)
    if cls is torchs:
        return None
    own = _own_code(cls, torchs)
    if own or not subclasses:
        why = f": its {own[0]} is its own" if own else "; subclasses=True swaps it"
        return f"a subclass may compute something else{why}"
    return None


# Nothing that forward uses: the drop-in of a subclass takes these from the subclass.
HARMLESS = {"__init__", "reset_parameters", "extra_repr", "__annotate__", "__annotate_func__"}
# Methods that ours have beyond torch.nn's, and use nowhere themselves: the subclass's own goes before it.
ADDED = {"step"}


def _own_code(cls: type, torchs: type) -> list[str]:
    """Which methods of torch.nn's class or of ours a subclass of torch.nn's has code of its own for, forward first."""
    theirs = (*torchs.__mro__, *OURS[torchs].__mro__)
    known = {name for base in theirs if base not in nn.Module.__mro__ for name in vars(base)} - HARMLESS - ADDED
    own = {
        name
        for base in cls.__mro__
        if base not in torchs.__mro__
        for name, value in vars(base).items()
        if inspect.isroutine(value) or isinstance(value, property)
    }
    return sorted(own & known, key=lambda name: (name != "forward", name))


def unsupported(module: nn.RNNBase | nn.RNNCellBase) -> str | None:
    """Why no backend that may be chosen here runs the drop-in of a module of torch.nn; None if one does."""
    try:
        plan_without_sizes(module)
    except ValueError as error:
        return str(error)
    return None


def plan_without_sizes(module: nn.RNNBase | nn.RNNCellBase) -> select.Plan:
    """The plan of a module of ours, or of the drop-in of one of torch.nn's, before anything is known of its input.

    Raises:
        ValueError: no backend runs it.
    """
    weight = next(module.parameters())
    options = getattr(module, "cell_options", None)
    of_step = options.of_step(module.training, bool(module.proj_size)) if options else ()
    call = Call(cell_of(module), weight.device.type, weight.dtype, options=of_step)
    if isinstance(module, nn.RNNCellBase):
        call = call._replace(layout="cell")
    return select.plan(call, hardware.machine_of(weight.device), getattr(module, "backend", None))
