"""Entries for our modules in the table of torch.ao.quantization.quantize_dynamic: each becomes what torch.nn's becomes.

`quantize_dynamic(model)` asks only for torch.nn's classes, and passes ours over; with ours named it quantizes them:
`quantize_dynamic(model, {seqkernels.LSTM, torch.nn.Linear})`.
"""

import copy
from typing import Any

from torch import nn

from seqkernels.convert import swap_out
from seqkernels.on_import import when_imported
from seqkernels.swappable import TORCHS


def _through_torchs(quantized: Any) -> type:
    """A class for the table, whose from_float takes one of ours where that of `quantized` wants torch.nn's."""

    def from_float(cls, mod, *args, **kwargs):
        holder = nn.Sequential(copy.copy(mod))  # swap_out changes the class of an object: not that of the caller's
        left = swap_out(holder).left
        if left:
            raise ValueError(f"torch.ao quantizes no such {type(mod).__name__}: {left[0].reason}")
        return quantized.from_float(holder[0], *args, **kwargs)

    return type(quantized.__name__, (quantized,), {"from_float": classmethod(from_float), "__module__": __name__})


def _register(mappings) -> None:
    table = mappings.DEFAULT_DYNAMIC_QUANT_MODULE_MAPPINGS
    for ours, torchs in TORCHS.items():
        if torchs in table:  # torch quantizes no nn.RNN
            table[ours] = _through_torchs(table[torchs])


def register() -> None:
    """Make the entries as soon as torch.ao's table is imported, which is deprecated and slow to import."""
    when_imported("torch.ao.quantization.quantization_mappings", _register)
