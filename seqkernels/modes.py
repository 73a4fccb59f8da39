"""What torch is doing around a call: autograd, transforms, autocast, the compiler; and with it the call as `select`
sees it."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import hardware
from seqkernels.backends.call import Call, class_of_steps
from seqkernels.backends.cells import CELLS


def wants_gradients(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # faster than any(), in every call of a module
            if tensor is not None and tensor.requires_grad:
                return True
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            return any(_outside_of_vmap(tensor).requires_grad for tensor in tensors if tensor is not None)
    return False


def _outside_of_vmap(tensor: Tensor) -> Tensor:
    """What torch.vmap took members of: a member itself says that it requires no gradient."""
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@hardware.constant_in_traces  # a compiler traces code within its transforms
def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def forward_mode(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD goes through any of them."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@hardware.constant_in_traces
def only_vmap() -> bool:
    """Whether torch.vmap is the only transform: it runs operators by their rules."""
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return all(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def has_members(values: Tensor, name: str) -> bool:
    """Whether each member of torch.vmap has values of its own, which the host cannot read.

    Raises:
        RuntimeError: they are within another transform, which would read them.
    """
    compiling = torch.compiler.is_compiling()  # where nobody reads them
    while not compiling and torch._C._functorch.is_functorch_wrapped_tensor(values):
        if torch._C._functorch.is_batchedtensor(values):
            if not only_vmap():
                raise RuntimeError(
                    f"{name} of its own for each member of torch.vmap goes with no other transform of torch.func: take "
                    "gradients by backward() outside of vmap"
                )
            return True
        values = torch._C._functorch.get_unwrapped(values)
    return False


def computed_dtype(x: Tensor) -> torch.dtype:
    """The dtype of x, or the one that autocast will give it."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return x.dtype
    device_type = x.device.type
    autocast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else x.dtype


def facts_of(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    sequences: int,
    batch_sizes: Tensor | None,
    transformed: bool,
    num_layers: int = 1,
    directions: int = 1,
    one_step: bool = False,
) -> tuple[Call, bool]:
    """A call on rows x ``[N, I]`` of so many sequences, or one step of a cell, as `select` sees it; and whether
    gradients are wanted."""
    device, training = x.device, wants_gradients(x, *states, *weights)
    splits = device.type == "cpu" and hardware.THIS_MACHINE.splits_float32
    parts = hardware.bfloat16_parts(device, x.dtype) if splits else 0
    vmapped = transformed and only_vmap()
    transformed = transformed and not vmapped
    # When compiling no size is asked for, as that would put a guard on it; torch.jit.trace has none that is a number;
    # on a CPU there is nothing to weigh.
    compiled = torch.compiler.is_compiling()
    sizes = not compiled and torch._C._get_tracing_state() is None
    if not sizes or (device.type == "cpu" and hardware.THIS_MACHINE.gpu is None):
        make = Call if compiled else _call_without_sizes
        facts = cell, device.type, x.dtype, transformed, compiled, num_layers, directions
        call = make(*facts, bfloat16_parts=parts, vmapped=vmapped) if vmapped or parts else make(*facts)
        return call, training
    layout, steps = "cell" if one_step else "padded", x.shape[0] // max(sequences, 1)
    if batch_sizes is not None:
        layout, steps = "packed" if batch_sizes.device.type == "cpu" else "device", len(batch_sizes)
    dtype = computed_dtype(x)
    call = Call(
        cell=cell,
        device_type=device.type,
        dtype=dtype,
        transformed=transformed,
        hidden_size=weights[1].shape[0] // CELLS[cell].gates,
        projected=len(weights) // (num_layers * directions) % 2 == 1,
        tf32=x.is_cuda and dtype == torch.float32 and hardware.tf32(device),
        input_size=x.shape[1],
        layers=num_layers,
        directions=directions,
        sequences=sequences,
        steps=class_of_steps(steps),
        layout=layout,
        training=training,
        cudnn=torch.backends.cudnn.enabled,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        capturing=x.is_cuda and layout == "packed" and torch.cuda.is_current_stream_capturing(),
        bfloat16_parts=parts,
        vmapped=vmapped,
    )
    return call, training


# Calls that differ in their sizes alone are the same object, which also finds its plan faster.
_call_without_sizes = functools.lru_cache(1024)(Call)
