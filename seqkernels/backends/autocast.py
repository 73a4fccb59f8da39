"""The autocast rule of the operators: all arguments in autocast's dtype, each weight cast once in a region."""

import functools
import weakref
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

# In inference mode torch keeps no casts. One of fewer numbers takes less time than telling a region from the next, and
# memory that is kept until a region ends is no longer in a cache.
_WORTH_KEEPING = 1 << 20


def cast_arguments(function: Callable, device_type: str) -> Callable:
    """The autocast rule: every floating tensor in autocast's dtype (float64 is left alone), as for torch's matmul."""

    def rule(*args):
        dtype = torch.get_autocast_dtype(device_type)
        cast_args = [cast(arg, dtype, device_type) for arg in args]
        with torch.amp.autocast(device_type, enabled=False):
            return function(*cast_args)

    return rule


def cast(value, dtype: torch.dtype, device_type: str):
    """An argument as the rule has it, and so what a list or tuple holds."""
    if not isinstance(value, Tensor):
        return [cast(one, dtype, device_type) for one in value] if isinstance(value, (list, tuple)) else value
    own = value.dtype
    if own == dtype or own == torch.float64 or not own.is_floating_point or value.device.type != device_type:
        return value
    return _Region.cast_of(value, dtype) if _is_cached(value) else value.to(dtype)


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
    hooks of saved tensors, as `_Region` has operations and tensors of its own."""
    return (
        type(value) is nn.Parameter
        and value.dim() == 2
        and value.requires_grad
        and value.dtype == torch.float32
        and (not torch.is_inference_mode_enabled() or value.numel() >= _WORTH_KEEPING)
        and torch.is_autocast_cache_enabled()
        and torch.is_autocast_enabled(value.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )


class _Region:
    """The casts of the autocast region that goes on, and the weights they are of. They are those of torch's own cache,
    so that they are shared with torch's operations; asking that in every call takes longer than a small product. They
    go when torch drops them, which one that nobody else has tells."""

    casts: ClassVar[dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]]] = {}
    sign: ClassVar[Callable[[], Tensor | None]] = lambda: None

    @classmethod
    def cast_of(cls, weight: Tensor, dtype: torch.dtype) -> Tensor:
        key = id(weight), dtype
        found = cls.casts.get(key)  # another thread may end its region, and with it the cache
        if found and cls.sign() is not None:
            return found[1]
        with torch.inference_mode(False), torch.enable_grad():  # made where nobody wants gradients, it serves others
            if cls.sign() is None:
                cls.casts.clear()
                cls.sign = weakref.ref(_cast_by_torch(_sign_on(weight.device), dtype), lambda _: cls.casts.clear())
            cast = _cast_by_torch(weight, dtype)
        if cast.requires_grad:
            cls.casts[key] = weight, cast
            return cast
        # Before torch 2.13, torch's own operations leave one without gradients there if they came first under no_grad.
        return weight.to(dtype) if torch.is_grad_enabled() else cast


def _cast_by_torch(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Nothing in torch hands out what its cache has: a product with a matrix of no columns computes nothing, but saves
    it."""
    return torch.mm(weight, _nothing(weight.shape[1], dtype, weight.device)).grad_fn._saved_self  # type: ignore


@functools.lru_cache(64)
def _nothing(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(rows, 0, dtype=dtype, device=device, requires_grad=True)


@functools.cache
def _sign_on(device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, 1, device=device))
