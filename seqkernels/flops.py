"""What torch.utils.flop_counter says of the operators: the multiplications and additions of their matrix products.

They are those of torch.nn's modules: a step's input and state times the weights, and twice as much for the gradients.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

from seqkernels._ops import ops
from seqkernels.on_import import when_imported


def forward_flops(cell, x_shape, weight_shapes, h_0_shape, *_, **__) -> int:
    """Every row of the input meets w_ih, w_hh and, where there is one, w_hr of every direction of every layer. The rows
    and weights of an ensemble have its members in front."""
    return 2 * x_shape[-2] * sum(math.prod(shape) for shape in weight_shapes if len(shape) == len(x_shape))


def backward_flops(cell, grad_y, grad_h_n, grad_c_n, x_shape, weight_shapes, h_0_shape, *rest, **_) -> int:
    """The gradients of the states always, those of the input and of the weights where they are wanted."""
    (wants_x, wants_weights), layers = rest[4:6], rest[7] if len(rest) > 7 else 1
    first = weight_shapes[: len(weight_shapes) // layers]
    of_input = 2 * x_shape[-2] * sum(map(math.prod, first[:: len(weight_shapes) // h_0_shape[-3]]))
    everything = forward_flops(cell, x_shape, weight_shapes, h_0_shape)
    return everything - (0 if wants_x else of_input) + (everything if wants_weights else 0)


def recompute_flops(
    cell, grad_y, grad_h_n, grad_c_n, x_shape, weight_shapes, h_0_shape, c_0, sizes, *options, **_
) -> int:
    """Both passes."""
    of_stack = x_shape, weight_shapes, h_0_shape, c_0, sizes
    gradients = backward_flops(cell, grad_y, grad_h_n, grad_c_n, *of_stack, None, None, *options)
    return forward_flops(cell, x_shape, weight_shapes, h_0_shape) + gradients


def masked_backward_flops(
    cell, grad_y, grad_h_n, grad_c_n, x_shape, weight_shapes, h_0_shape, c_0, sizes, *rest, **_
) -> int:
    """Masks multiply no matrices."""
    y, saved, wants_x, wants_weights = rest[4:8]  # behind the masks
    of_layer = x_shape, weight_shapes, h_0_shape, c_0, sizes, y, saved
    return backward_flops(cell, grad_y, grad_h_n, grad_c_n, *of_layer, wants_x, wants_weights)


def layer_norm_forward_flops(cell, gates_x_shape, w_hh_shape, *_, **__) -> int:
    """Of W_hh alone: the products of the input are torch's, which counts them."""
    return 2 * gates_x_shape[0] * math.prod(w_hh_shape)


def layer_norm_backward_flops(cell, grad_y, grad_h_n, grad_c_n, gates_x_shape, w_hh_shape, *rest, **_) -> int:
    """The gradient of the states always, that of W_hh where it is wanted."""
    wants_w_hh = rest[-2]
    return layer_norm_forward_flops(cell, gates_x_shape, w_hh_shape) * (2 if wants_w_hh else 1)


Formulas: TypeAlias = Mapping[str, Callable[..., int]]  # of operators, by name

PLAIN: Formulas = {
    "recurrence_forward": forward_flops,
    "recurrence_backward": backward_flops,
    "recurrence_recompute": recompute_flops,
}
MASKED: Formulas = {"masked_forward": forward_flops, "masked_backward": masked_backward_flops}
LAYER_NORM: Formulas = {
    "layer_norm_forward": layer_norm_forward_flops,
    "layer_norm_backward": layer_norm_backward_flops,
}


def register(formulas: Formulas) -> None:
    """Let FlopCounterMode count these operators. To import it here would bring in Triton for all who do not count."""

    def add(counter) -> None:
        for name, formula in formulas.items():
            counter.register_flop_formula(getattr(ops, name))(formula)

    when_imported("torch.utils.flop_counter", add)
