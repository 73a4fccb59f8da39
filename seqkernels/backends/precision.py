"""Dtypes: what kernels compute in, and what autocast asks for."""

from collections.abc import Callable

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # those of the kernels in C++ and CUDA


def to_acc(*tensors: Tensor | None) -> list:
    """Tensors in the dtype of their accumulators: 16-bit ones as float32."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def cast_for_autocast(function: Callable, device_type: str) -> Callable:
    """The autocast rule: every floating tensor in autocast's dtype (float64 is left alone), as for torch's matmul."""

    def cast(value, dtype):
        if isinstance(value, (list, tuple)):
            return [cast(one, dtype) for one in value]
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    def rule(*args):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.amp.autocast(device_type, enabled=False):
            return function(*(cast(arg, dtype) for arg in args))

    return rule
