"""Dtypes: what kernels compute in."""

import torch
from torch import Tensor

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # those of the kernels in C++ and CUDA


def to_acc(*tensors: Tensor | None) -> list:
    """Tensors in the dtype of their accumulators: 16-bit ones as float32."""
    return [t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
