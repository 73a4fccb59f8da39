"""The CPU's operators called past torch's dispatcher, which takes longer than a small layer computes (csrc/direct.cpp).

That is done where nobody can tell: no mode, transform, trace, autocast or profiler is at work, and every tensor is a
plain one. All else goes by the operators, and so does what these refuse, as their errors are the ones that are known.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._device import DeviceContext  # that of torch.set_default_device, which concerns new tensors alone

from seqkernels import hardware


def _connected() -> Any:
    """The compiled library, once it knows how this torch turns its tensors into handles and back; None if it cannot:
    what torch has for that stands in no documentation."""
    try:
        aoti = torch._C._aoti
        torchs = aoti.unsafe_alloc_void_ptr_from_tensor, aoti.alloc_tensors_by_stealing_from_void_ptrs
        library = None if hardware.THIS_MACHINE.native_missing else hardware.native()
    except AttributeError:
        return None
    if library is not None:
        library.connect(*torchs, Tensor.is_neg, Tensor, Parameter)
    return library


_library = _connected()
_keys, _key = torch._C.DispatchKeySet, torch._C.DispatchKey
# What takes part in every call, in inference mode and else.
_IN_INFERENCE = _keys(_key.BackendSelect)
_ALONE = _IN_INFERENCE.raw_repr(), (_IN_INFERENCE | _keys(_key.ADInplaceOrView)).raw_repr()
# Found once: looking them up takes as long as calling them.
_included = torch._C._dispatch_tls_local_include_set  # knows of transforms, dispatch modes and traces
_function_modes, _function_mode = torch._C._len_torch_function_stack, torch._C._get_function_stack_at
_autocasts, _profiled = torch._C._is_any_autocast_enabled, torch.autograd._profiler_enabled


def unseen(but_autocast: bool = False) -> bool:
    """Whether nobody takes part in a call of an operator but the operator itself; or autocast, if it may. (Nor in a
    compiled one; forward-mode AD is for the caller to ask for.)"""
    if _library is None:
        return False
    modes = _function_modes()
    return (
        _included().raw_repr() in _ALONE
        and (not modes or all(type(mode) is DeviceContext for mode in map(_function_mode, range(modes))))
        and (but_autocast or not _autocasts())
        and not _profiled()
    )


def forward(backend: str, args: Sequence, batch_first: bool | None) -> tuple[Tensor, ...] | None:
    """What recurrence_forward gives for args; None: it has to be called. batch_first: None for rows; else their x is a
    padded batch ``[T, B, I]``, and y is one, with True ``[B, T, H]``. Of a cell, whose states are ``[B, H]``, no
    h_n."""
    if not (backend.startswith("cpu") and unseen()):
        return None
    found = _library.forward(backend != "cpu", *args, batch_first)
    return found and tuple(found)


def backward(
    backend: str, args: Sequence, batch_first: bool | None
) -> tuple[Tensor, list[Tensor], Tensor, Tensor] | None:
    """What recurrence_backward gives for args; None: it has to be called. batch_first and states as in `forward`, also
    of gradients. Autocast has no part in it, as the arguments are of the forward pass."""
    if not (backend.startswith("cpu") and unseen(but_autocast=True)):
        return None
    found = _library.backward(backend != "cpu", *args, batch_first)
    return found and (found[0], found[3:], found[1], found[2])


# y, h_n, c_n of a layer on a padded batch, h and c of a cell, without gradients: the library's function of that name;
# None: the long way has to be gone. `unseen` is for the caller to ask for.
layer: Callable[..., list[Tensor] | None] = getattr(_library, "layer", lambda *_: None)
