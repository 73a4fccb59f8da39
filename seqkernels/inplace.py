"""Outputs that are changed in place before the backward pass, as residuals (`y += x`), activations and masks do.

torch.nn's RNN and GRU allow it where they keep a copy of what they return. We keep none: the backward pass reads y
itself, and where it was changed, y is computed once more.
"""

import functools

import torch
from torch import Tensor


class Changes:
    """Tells whether a tensor was changed in place since, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        with torch._C._DisableTorchDispatch():  # so that modes see what a call computes, and not this
            self._alias = tensor.detach()  # which has the version counter of the tensor, and no reference to it,
            self._alias.data = _no_memory(tensor.dtype, tensor.device)  # also with other memory
        self._before = self._alias._version

    def any(self) -> bool:
        return self._alias._version != self._before


@functools.cache
def _no_memory(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


def kept(y: Tensor) -> tuple[Changes | None, Tensor]:
    """What an autograd formula saves of the output y for its backward pass."""
    if type(y) is Tensor:
        return Changes(y), y.data
    return None, y.clone()  # a compiler's stand-in: what it makes of this copy is one only where y changes
