"""Outputs that are changed in place before the backward pass, as residuals (`y += x`), activations and masks do.

torch.nn's RNN and GRU allow it where they keep a copy of what they return. We keep none: the backward pass reads y
itself, and where it was changed, y is computed once more.
"""

import torch
from torch import Tensor


class Changes:
    """Tells whether a tensor was changed in place since, without keeping its memory."""

    def __init__(self, tensor: Tensor) -> None:
        with torch.no_grad():
            self._view = tensor.view_as(tensor)  # a view has the version counter of its base,
            self._view.set_(tensor.new_empty(0))  # type: ignore[call-overload]  # also with other memory
        self._before = self._view._version

    def any(self) -> bool:
        return self._view._version != self._before
