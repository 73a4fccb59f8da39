"""Packed weights of modules that stay between calls, on CPUs.

The CPU's kernels multiply by packed weights (docs/glossary.md), which a call makes of those that it is given. In
inference, that is where no weight wants a gradient, each module has a place for them (csrc/cpu/kept_weights.h), where
the next call finds them. It takes them only if they are what it would make itself: it compares fingerprints of all
numbers, since torch's count of a tensor's versions says nothing of changes through `.data`, through NumPy, or by
another process that shares them. So nothing is ever stale, and results are the same to the bit.

They take as much memory as the weights that are packed, of the layers where packing is seen in the time of a call; and
the module that goes takes them with it. SEQKERNELS_KEEP_PACKED=0 keeps none, and of a module its attribute keep_packed.
"""

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from seqkernels import hardware, modes

if TYPE_CHECKING:
    from seqkernels.modules import _Recurrent

_NAME = "_place"  # of the attribute of a module

_library = None if hardware.THIS_MACHINE.native_missing else hardware.native()
ON = _library is not None and os.environ.get("SEQKERNELS_KEEP_PACKED", "1") != "0"
_free = list(range(_library.PLACES, 0, -1)) if ON else []  # type: ignore[union-attr]


def place_of(module: "_Recurrent") -> int:
    """Where the packed weights of a module lie between its calls; 0: nowhere."""
    if not (ON and module.keep_packed):
        return 0
    place = module.__dict__.get(_NAME)
    if place is None and _free:  # else thousands of modules have one
        place = module.__dict__[_NAME] = _free.pop()
        weakref.finalize(module, _give_back, place)
    return place or 0


def place_for(module: "_Recurrent", weights: Sequence[Tensor]) -> int:
    """The same for a call with these weights; 0 as well where one wants gradients, or the call is recorded, of which
    the place is no part."""
    if torch.compiler.is_compiling() or modes.wants_gradients(*weights) or not weights[0].is_cpu:
        return 0
    recorded = torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() or modes.transformed()
    return 0 if recorded else place_of(module)


def kept(module: nn.Module) -> tuple[int, int]:
    """Of the packed weights that a module keeps the bytes, and how many panels of them were packed so far."""
    place = module.__dict__.get(_NAME)
    return _library.kept_weights(place) if place else (0, 0)  # type: ignore[union-attr]


def forget(state: dict) -> None:
    """Of a module: its copy gets a place of its own."""
    state.pop(_NAME, None)


def _give_back(place: int) -> None:
    _library.release_weights(place)  # type: ignore[union-attr]
    _free.append(place)
