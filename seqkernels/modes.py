"""What torch is doing around a call: autograd, transforms, autocast."""

import torch
from torch import Tensor


def wants_gradients(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # faster than any(), in every call of a module
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def only_vmap() -> bool:
    """Whether torch.vmap is the only transform: it runs operators by their rules."""
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, or the one that autocast will give it."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return x.dtype
    device_type = x.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else x.dtype
