"""Argument checks of the functions and modules, with torch.nn's own messages where torch.nn has one."""

import numbers
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter, ParameterList
from torch.nn.utils.rnn import PackedSequence

from seqkernels import late_checks
from seqkernels.backends.cells import CELLS

State = Tensor | tuple[Tensor, Tensor]
_SEQUENCES = list, tuple, Sequence, ParameterList  # those first that are fast to ask for


def check_call(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    count: int,
    bias: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | PackedSequence | None = None,
    reset_to: State | None = None,
) -> tuple[bool, Tensor | None]:
    """Arguments of a call of `count` layers and directions -> whether the input is one unbatched sequence, and the mask
    of resets, of packed and nested inputs that of the rows.

    Raises:
        TypeError, ValueError, RuntimeError: torch.nn's own, and those for what it does not have.
    """
    if len(weights) != (4 if bias else 2) * count:
        _check_count(len(weights), count, bias, cell)
    unbatched = _is_unbatched(cell, input, hx, lengths, cu_seqlens)
    if isinstance(input, PackedSequence):
        _check_input(input.data, weights, 2)
    else:
        _check_input(input, weights, 3 if cu_seqlens is None else 2)
    if reset_to is not None:
        _check_reset_to(cell, reset, reset_to)
    return unbatched, None if reset is None else _reset_mask(reset, input, cu_seqlens)


def _check_count(given: int, count: int, bias: bool, cell: str) -> None:
    """There may be a projection beside the weights that every cell has."""
    each = given // count
    kinds, can_project = 4 if bias else 2, CELLS[cell].can_project
    if each * count != given or not (each == kinds or (can_project and each == kinds + 1)):
        raise ValueError(
            f"expected {kinds} weights{' (or one more, a projection)' if can_project else ''} for each of "
            f"{count} layers and directions, got {given} in all"
        )


def _is_unbatched(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
) -> bool:
    """Whether the input is one unbatched sequence; raises where numbers of dimensions or options do not fit."""
    if hx is not None:
        check_kind_of_state(cell, hx)
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("give lengths or cu_seqlens, not both")
    if isinstance(input, PackedSequence):
        if lengths is not None or cu_seqlens is not None:
            raise ValueError("a PackedSequence has its lengths in it; give no lengths or cu_seqlens beside it")
        return False
    check_kind_of_input(CELLS[cell].display_name, input)
    if cu_seqlens is not None:
        return False
    if input.is_nested:
        _check_nested(input, lengths)
        return False
    name, dimensions = CELLS[cell].display_name, input.dim()
    if dimensions not in (2, 3):
        raise ValueError(
            f"{name}: Expected input to be 2D or 3D, got {dimensions}D {'tensor ' if name == 'RNN' else ''}instead"
        )
    unbatched = dimensions == 2
    if unbatched and lengths is not None:
        raise ValueError("lengths go with a batch of sequences (3-D input); cut one unbatched sequence instead")
    batch = "unbatched 2" if unbatched else "batched 3"
    if hx is not None and CELLS[cell].states == 2 and (hx[0].dim() != dimensions or hx[1].dim() != dimensions):
        raise RuntimeError(
            f"For {batch}-D input, hx and cx should also be {dimensions}-D "
            f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    if hx is not None and CELLS[cell].states == 1 and hx.dim() != dimensions:  # type: ignore[union-attr]
        raise RuntimeError(
            f"For {batch}-D input, hx should also be {dimensions}-D but got {hx.dim()}-D tensor"  # type: ignore[union-attr]
        )
    return unbatched


def _check_nested(input: Tensor, lengths: Tensor | Sequence[int] | None) -> None:
    if lengths is not None:
        raise ValueError("a nested tensor has its lengths in it; give no lengths beside it")
    if input.layout != torch.jagged or input.dim() != 3 or input._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "a nested tensor of sequences is [sequences, steps of each, features] of the jagged layout: "
            "torch.nested.nested_tensor(sequences, layout=torch.jagged)"
        )


def check_kind_of_input(name: str, input: object) -> None:
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"{name}: Expected input to be a Tensor or a PackedSequence, got a {type(input).__name__}")


def check_kind_of_state(cell: str, state: State, argument: str = "hx") -> None:
    name = CELLS[cell].display_name
    if CELLS[cell].states == 2:
        return check_pair(state, name, argument)
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: {argument} must be a Tensor, not a {type(state).__name__}")


def check_pair(hx: State, name: str, argument: str = "hx") -> None:
    if not isinstance(hx, _SEQUENCES):
        raise TypeError(f"{name}: {argument} must be a tuple of two Tensors, not a {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{name} expects two hidden states, got {len(hx)}")
    for state in hx:
        if not isinstance(state, Tensor):
            raise TypeError(f"{name}: {argument} must be a tuple of two Tensors, not of a {type(state).__name__}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, got {value!r}")


def check_function(weights: Sequence[Tensor], num_layers: int, dropout: float) -> None:
    """What a function is given at each call, and a module once, when it is made.

    Raises:
        TypeError, ValueError, RuntimeError: they are of another kind, or do not fit.
    """
    if not isinstance(weights, _SEQUENCES):
        raise TypeError(f"weights are a sequence of Tensors, got a {type(weights).__name__}")
    weights = list(weights)  # of a ParameterList each would be looked up by name again and again
    for weight in weights:
        if not isinstance(weight, (Tensor, Proxy)):  # torch.fx itself says what of a Proxy it cannot trace
            raise TypeError(f"weights are Tensors, got a {type(weight).__name__} among them")
    check_kind(weights)
    if len(weights) > 1 and not weights[0].dim() == weights[1].dim() == 2:
        raise RuntimeError(f"w_ih and w_hh are matrices, got {[list(weight.shape) for weight in weights[:2]]}")
    if isinstance(num_layers, bool) or not isinstance(num_layers, (int, numbers.Integral)):
        raise TypeError(f"num_layers is an int, got a {type(num_layers).__name__}")
    if num_layers <= 0:
        raise ValueError("num_layers must be greater than zero")
    if isinstance(dropout, bool) or not isinstance(dropout, (float, numbers.Real)) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being zeroed"
        )


def any_expanded(weights: Sequence[Tensor]) -> bool:
    """Whether call_for_per_sample_grads has put its own kind of tensor in the place of a weight."""
    return any(type(weight) is not Parameter and type(weight).__name__ == "ExpandedWeight" for weight in weights)


def check_kind(weights: Sequence[Tensor]) -> None:
    """No ExpandedWeight: it knows torch's operations alone, and refuses ours without a hint."""
    if any_expanded(weights):
        raise RuntimeError(
            "call_for_per_sample_grads knows torch.nn's layers and their arguments alone; take the gradients of each "
            "sample by torch.func.vmap(torch.func.grad(loss))"
        )


def _check_input(data: Tensor, weights: Sequence[Tensor], dimensions: int) -> None:
    w_ih = weights[0]
    if data.dtype != w_ih.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({data.dtype})"
        )
    if data.dim() not in (2, dimensions):
        raise RuntimeError(f"input must have {dimensions} dimensions, got {data.dim()}")
    if data.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {data.shape[-1]}"
        )
    _check_weights(weights, data)


def fail_on_columns(w_hh: Tensor, hidden_size: int) -> NoReturn:
    shape = [w_hh.shape[0], hidden_size]
    raise RuntimeError(f"w_hh is {shape}, got {list(w_hh.shape)}; that of blocks goes with cell_options that have them")


def _check_weights(weights: Sequence[Tensor], data: Tensor) -> None:
    device, dtype = data.device, data.dtype
    for weight in weights:
        if weight.device != device or weight.dtype != dtype:
            check_same(weight, data, "parameter")


def _check_reset_to(cell: str, reset: Tensor | PackedSequence | None, reset_to: State) -> None:
    if reset is None:
        raise ValueError("reset_to is the state before steps that reset marks; give reset as well")
    check_kind_of_state(cell, reset_to, "reset_to")


def check_state(state: Tensor, size: tuple[int, ...], data: Tensor, message: str, name: str = "hidden") -> None:
    if state.shape != size:
        raise RuntimeError(message.format(size, list(state.shape)))
    check_same(state, data, name)


def check_same(tensor: Tensor, data: Tensor, name: str = "hidden") -> None:
    """Device and dtype of a state or a weight are those of the input; autocast makes the dtypes equal by itself."""
    if tensor.device != data.device:
        raise RuntimeError(
            f"Input and {name} tensors are not at the same device, found input tensor at {data.device} "
            f"and {name} tensor at {tensor.device}"
        )
    if tensor.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(f"RNN {name} tensor dtype ({tensor.dtype}) does not match input dtype ({data.dtype})")


def check_input_of_step(input: object) -> None:
    if not isinstance(input, (Tensor, Proxy)):
        raise TypeError(f"a step takes a Tensor, got a {type(input).__name__}")
    if input.dim() not in (1, 2):
        raise ValueError(f"a step takes [sequences, features] or [features], got {input.dim()} dimensions")


def check_step(input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Arguments of one step of a cell: input ``[B, I]``, states ``[B, H]``."""
    w_ih, w_hh, *_ = weights
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}")
    for k, state in enumerate(states):
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
        if state.shape[1] != w_hh.shape[1]:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {w_hh.shape[1]}"
            )
        check_same(state, input)
    _check_weights(weights, input)


def _reset_mask(reset: Tensor | PackedSequence, input: Tensor | PackedSequence, cu_seqlens: Tensor | None) -> Tensor:
    """
    Raises:
        TypeError: no mask of torch.bool.
        ValueError: a mask of another shape, on another device than the input or the CPU, or of other sequences.
    """
    if isinstance(input, PackedSequence):
        return _mask_of_packed(reset, input)
    if input.is_nested:
        return _mask_of_nested(reset, input.contiguous())
    return _check_mask(reset, input.shape[:-1] if cu_seqlens is None else input.shape[:1], input)


def _check_mask(reset, shape: Sequence[int], input: Tensor) -> Tensor:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        what = f"a tensor of {reset.dtype}" if isinstance(reset, Tensor) else f"a {type(reset).__name__}"
        raise TypeError(f"reset is a mask of torch.bool, got {what}")
    if reset.is_nested or reset.shape != shape:
        found = "a nested tensor" if reset.is_nested else f"the shape {list(reset.shape)}"
        raise ValueError(f"reset is {list(shape)}, one for each step of the input, got {found}")
    if reset.device.type != "cpu" and reset.device != input.device:
        raise ValueError(f"reset is on the CPU or where the input is, found {input.device} (input) and {reset.device}")
    return reset


def _mask_of_packed(reset, input: PackedSequence) -> Tensor:
    if isinstance(reset, PackedSequence):
        if not torch.compiler.is_compiling():
            _check_same_sequences("batch_sizes", reset.batch_sizes, input.batch_sizes)
            _check_same_sequences("sorted_indices", reset.sorted_indices, input.sorted_indices)
        reset = reset.data
    return _check_mask(reset, input.data.shape[:1], input.data)


def _mask_of_nested(reset, input) -> Tensor:
    if isinstance(reset, Tensor) and reset.is_nested and reset.layout == torch.jagged:
        reset = reset.contiguous()
        if not torch.compiler.is_compiling():
            _check_same_sequences("offsets", reset.offsets(), input.offsets())
        reset = reset.values()
    return _check_mask(reset, input.values().shape[:1], input.values())


def _check_same_sequences(name: str, of_reset: Tensor | None, of_input: Tensor | None) -> None:
    """What says which sequences there are; on a GPU nobody looks."""
    if of_reset is None or of_input is None or of_reset is of_input:
        same = of_reset is of_input
    elif late_checks.out_of_sight(of_reset) or late_checks.out_of_sight(of_input):
        same = of_reset.shape == of_input.shape
    else:
        same = torch.equal(of_reset, of_input)
    if not same:
        raise ValueError(f"reset has other {name} than the input")
