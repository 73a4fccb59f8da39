"""The autocast rule of the operators: all arguments in autocast's dtype, each weight cast once in a region."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def cast_arguments(function: Callable, device_type: str) -> Callable:
    """The autocast rule: every floating tensor in autocast's dtype (float64 is left alone), as for torch's matmul."""

    def cast(value, dtype):
        if isinstance(value, (list, tuple)):
            return [cast(one, dtype) for one in value]
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        if not eligible or value.device.type != device_type or value.dtype == dtype:
            return value
        return _cast_of_region(value, dtype) if _is_cached(value) else value.to(dtype)

    def rule(*args):
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = [cast(arg, dtype) for arg in args]
        with torch.amp.autocast(device_type, enabled=False):
            return function(*cast_args)

    return rule


def switched_off(function: Callable) -> Callable:
    """A backward pass in the dtypes that it is given, also inside a region, which would cast its products."""

    def run(cell, *args):
        if not torch._C._is_any_autocast_enabled():
            return function(cell, *args)
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.amp.autocast(device_type, enabled=False):
            return function(cell, *args)

    return run


def _is_cached(value: Tensor) -> bool:
    """Whether torch keeps the cast of a tensor until the autocast region ends: of parameters that want gradients, in
    float32. Only matrices are looked up here: casting a bias costs less. And not under modes that see operations or
    hooks of saved tensors, as `_cast_of_region` has operations and tensors of its own."""
    return (
        type(value) is nn.Parameter
        and value.dim() == 2
        and value.requires_grad
        and value.dtype == torch.float32
        and torch.is_autocast_cache_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


def _cast_of_region(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The cast from torch's own cache, so that it is shared with torch's operations and dropped when they drop it.

    Nothing in torch hands it out: a product with a matrix of no columns computes nothing, but saves it.
    """
    with torch.inference_mode(False), torch.enable_grad():  # made where no gradients are wanted, it serves others, too
        nothing = torch.empty(weight.shape[1], 0, dtype=dtype, device=weight.device, requires_grad=True)
        cast = torch.mm(weight, nothing).grad_fn._saved_self  # type: ignore[union-attr]
    # Before torch 2.13, torch's own operations leave one without gradients there if they came first under no_grad.
    return cast if cast.requires_grad or not torch.is_grad_enabled() else weight.to(dtype)
