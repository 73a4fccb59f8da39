"""Packed weights of modules that stay between calls, on CPUs.

The CPU's kernels multiply by packed weights (docs/glossary.md), which a call makes of those that it is given. Where no
gradients are wanted, each module has a slot for them (csrc/cpu/kept_weights.h), in which the next call finds them. It
takes them only if they are what it would make itself: with them lies a copy of what they were made from, of which it
compares every byte. Torch's count of a tensor's versions would not do, as it says nothing of changes through `.data`,
through NumPy, or by another process that shares the memory. So nothing is ever stale, and results are the same to the
bit.

Slots are known by modules, and not kept in them: no copy, pickle or trace of a module has any part in its slot.
"""

import os
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from seqkernels import hardware, modes
from seqkernels.backends import cpu
from seqkernels.select import Plan

if TYPE_CHECKING:
    from seqkernels.cell_modules import _Cell
    from seqkernels.modules import _Recurrent

_library = None if hardware.THIS_MACHINE.native_missing else hardware.native()
ON = _library is not None and os.environ.get("SEQKERNELS_KEEP_PACKED", "1") != "0"
_free = list(range(_library.SLOTS, 0, -1)) if ON else []  # type: ignore[union-attr]
_slots: dict[int, int] = {}  # by the modules' ids
_MIN_HIDDEN = 48  # of layers whose packing shows in the time of a call; the kernels look at it in full


def slot_of(module: "_Recurrent | _Cell") -> int:
    """The slot of a module; 0: its packed weights do not stay."""
    if not ON or module.hidden_size < _MIN_HIDDEN:
        return 0
    if not module.keep_packed:
        release(module)
        return 0
    return _slots.get(id(module)) or _take(module)


def launch_of(module: "_Recurrent | _Cell", launch: tuple[int, ...]) -> tuple[int, ...]:
    """What the CPU's operators are told of a call of a module without gradients: `launch`, and its slot if any."""
    slot = slot_of(module)
    return cpu.keeping(launch, slot) if slot else launch


def keeping(module: "_Recurrent | _Cell", plan: Plan, save: bool) -> Plan:
    """The plan of a call of a module, with its slot where that has a part in it: not where gradients are wanted, nor in
    calls that are recorded or transformed."""
    if plan.backend != "cpu" or save or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return plan
    if torch._C._len_torch_dispatch_stack() or modes.transformed():
        return plan
    return plan._replace(launch=launch_of(module, plan.launch))


def kept(module: "_Recurrent | _Cell") -> tuple[int, int]:
    """Of what a module keeps the bytes, and how often panels of it were packed."""
    slot = _slots.get(id(module))
    return _library.kept_weights(slot) if slot else (0, 0)  # type: ignore[union-attr]


def release(module: nn.Module) -> None:
    """Give back what a module keeps."""
    if slot := _slots.get(id(module)):
        _library.release_weights(slot)  # type: ignore[union-attr]


def _take(module: "_Recurrent | _Cell") -> int:
    if not _free:  # that many modules have one
        return 0
    slot = _free.pop()
    found = _slots.setdefault(id(module), slot)
    if found == slot:
        weakref.finalize(module, _give_back, id(module)).atexit = False
    else:  # another thread was faster
        _free.append(slot)
    return found


def _give_back(module_id: int) -> None:
    slot = _slots.pop(module_id)
    _library.release_weights(slot)  # type: ignore[union-attr]
    _free.append(slot)
