"""PyTorch's samples of its recurrent modules (torch.testing._internal.common_modules), built and run as ours and as
torch.nn's."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import seqkernels

# Importing it takes the setting of torch.backends' flags from the whole process, and so from other files' tests.
with mock.patch("torch.backends.disable_global_flags"):
    from torch.testing._internal.common_modules import module_db


NAMES = ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")
INFOS = [info for info in module_db if info.module_cls in {getattr(nn, name) for name in NAMES}]
LAYERS = [info for info in INFOS if issubclass(info.module_cls, nn.RNNBase)]


def label(value) -> str:
    return value.module_cls.__name__ if hasattr(value, "module_cls") else str(value).removeprefix("torch.")


def modes(infos):
    """One parameter set for each module and for each of train and eval in which it may differ."""
    pairs = [(info, training) for info in infos for training in (True, False)[: 1 + info.train_and_eval_differ]]
    return pytest.mark.parametrize(
        "info, training",
        [pytest.param(info, mode, id=f"{label(info)}-{'train' if mode else 'eval'}") for info, mode in pairs],
    )


every_module = pytest.mark.parametrize("info", INFOS, ids=label)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)


def ours(info):
    return getattr(seqkernels, info.module_cls.__name__)


def samples(info, dtype=torch.float64, training=True, requires_grad=False, **kwargs):
    """PyTorch's samples for one module: each holds constructor_input, forward_input and, mostly, reference_fn."""
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **kwargs
    )
    found = [sample for sample in found if sample.forward_input is not None]
    assert found
    return found


def build(cls, sample, dtype=torch.float64, training=True, device="cpu"):
    """The sample's module of class `cls`."""
    arguments = {"device": device, "dtype": dtype, **sample.constructor_input.kwargs}
    return cls(*sample.constructor_input.args, **arguments).train(training)


def build_both(info, sample, dtype=torch.float64, training=True):
    """Our module and torch.nn's, with the same parameters."""
    module, judge = (build(cls, sample, dtype, training) for cls in (ours(info), info.module_cls))
    judge.load_state_dict(module.state_dict())
    return module, judge


def call(module, sample):
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def on_tensors(fn, forward_input):
    """Copies of args and kwargs with `fn` applied to every floating tensor, inside a PackedSequence too."""

    def apply(leaf):
        if isinstance(leaf, PackedSequence):
            return leaf._replace(data=fn(leaf.data))
        return fn(leaf) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    arguments = (forward_input.args, forward_input.kwargs)
    return tree_map(apply, arguments, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def tensors(tree):
    """The floating tensors of nested results, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def results_and_gradients(module, arguments):
    """Outputs, and the gradients of a weighted sum of them for every input and parameter."""
    args, kwargs = arguments
    outputs = tensors(module(*args, **kwargs))
    weights = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) for out in outputs]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, [*tensors(arguments), *module.parameters()])


def leaf_copy(tensor):
    return tensor.detach().clone().requires_grad_()


def strided_copy(tensor):
    """The same values, with a hole after each of them; a leaf."""
    holed = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
    copied = holed[..., 0].copy_(tensor.detach())
    # Sizes of one would still count as contiguous, whatever the strides.
    assert not copied.is_contiguous() or tensor.numel() == 1
    return copied.detach().requires_grad_()


def transposed_copy(tensor):
    """The same values, laid out in memory with the dimensions the other way round; a leaf."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.detach().permute(order).contiguous().permute(order).requires_grad_()
