"""What a layer may do with its states beyond torch.nn: return those of every step, and learn those it begins with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, functional, modes, onnx_export, ops, with_options
from seqkernels.backends import stack, torch_steps
from seqkernels.backends.cells import CELLS
from seqkernels.backends.torch_steps import Variant
from seqkernels.cell_options import CellOptions
from seqkernels.checks import State
from seqkernels.inputs import prepare, restore_layers, restore_layout

if TYPE_CHECKING:
    from seqkernels.drop_in import Layer

INITIAL = ("initial_h", "initial_c")


def learn_initial(layer: "Layer", dtype: torch.dtype, device: torch.device) -> None:
    """Give a layer its parameters initial_h ``[L*D, P]`` and, with two states, initial_c ``[L*D, H]``: zeros."""
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: CELLS[layer.mode.lower()].states]
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    for name, size in zip(INITIAL, sizes, strict=False):
        layer.register_parameter(name, nn.Parameter(torch.zeros(count, size, dtype=dtype, device=device)))
    keep_own_parameters(layer)


def keep_own_parameters(layer: "Layer") -> None:
    """A state dict of torch.nn has not the parameters that are ours alone: those that are there stay."""
    layer.register_load_state_dict_pre_hook(_keep_own)


def _keep_own(layer, state_dict: dict, prefix: str, *_) -> None:
    if any(prefix + name in state_dict for name in layer._flat_weights_names):
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in layer._flat_weights_names:
                state_dict.setdefault(prefix + name, parameter.detach())


_keep_initial = _keep_own  # its name in pickles of 0.2.0


def initial_parameters(layer: "Layer") -> list[tuple[str, Tensor]]:
    return [(name, getattr(layer, name)) for name in INITIAL if hasattr(layer, name)]


def initial(layer: "Layer", input: Tensor | PackedSequence, batched: int = 3) -> State:
    """The learned state, once for each sequence; `batched`: the dimensions of an input of several."""
    states = [parameter for _, parameter in initial_parameters(layer)]
    if isinstance(input, PackedSequence):
        sequences = int(input.batch_sizes[0])
    elif input.dim() == batched:
        sequences = input.shape[0 if batched == 2 or layer.batch_first or input.is_nested else 1]
    else:
        return states[0] if len(states) == 1 else (states[0], states[1])
    h, *c = (state.unsqueeze(1).expand(-1, sequences, -1).contiguous() for state in states)
    return (h, c[0]) if c else h


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    *,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | PackedSequence | None,
    reset_to: State | None,
    recompute: bool,
    backend: str | None,
    cell_options: CellOptions | None = None,
    norms: Sequence[Tensor] = (),
) -> tuple[Tensor | PackedSequence, State, State]:
    """`seqkernels.functional.recurrent`, layer by layer, and the states of every step (see docs/states.md)."""
    directions = 2 if bidirectional else 1
    checks.check_flag("recompute", recompute)
    parts = with_options.parts_of(cell, weights, cell_options, norms, training, num_layers * directions, bias)
    if onnx_export.exporting():
        raise ValueError("ONNX's operators give no c of every step: export without return_all_states")
    ragged = lengths, None, None, reset, reset_to
    blocks = 1 if parts is None else parts.cell_options.blocks
    inputs = prepare(cell, input, hx, weights, num_layers, directions, batch_first, *ragged, bias, False, blocks)
    plan = functional.plan_of(inputs, parts, backend)
    of_layers: Sequence[with_options.Parts | None] = [None] * num_layers
    if parts is not None:
        weights = with_options.dropped(weights, parts, num_layers * directions)
        of_layers = parts.of_layers(num_layers)
    x, batch_sizes, call = inputs.rows.data, inputs.rows.batch_sizes, inputs.call._replace(layers=1)
    ys, cs, ends = [], [], []
    each = stack.each(num_layers, weights, inputs.h_0, inputs.c_0)
    for layer, ((of_layer, h_0, c_0), own) in enumerate(zip(each, of_layers, strict=True)):
        if layer and training and dropout > 0:
            x = F.dropout(x, dropout, True)
        args = of_layer, h_0, c_0, batch_sizes
        if own is None:
            wanted = modes.wants_gradients(x, h_0, c_0, *of_layer)
            y, *end = ops.recurrence_forward(plan, call, x, *args, wanted, recompute)
            variant = Variant()
        else:
            x, masks = with_options.drawn(own, x, h_0, c_0, batch_sizes)
            y, *end = with_options.run_layer(plan, call, own, x, *args, masks, recompute)
            variant = with_options.variant_of(own.cell_options, masks)
        if c_0 is not None:
            cs.append(_cell_states(x, y, *args, () if own is None else own.norms, variant, recompute))
        ys.append(y)
        ends.append(end)
        x = y
    output, states = restore_layout(inputs, ys[-1], *(torch.cat(of_layers) for of_layers in zip(*ends, strict=True)))
    h = restore_layers(inputs, ys)
    return output, states, h if inputs.c_0 is None else (h, restore_layers(inputs, cs))


def _cell_states(x, y, weights, h_0, c_0, batch_sizes, norms, variant: Variant, recompute: bool) -> Tensor:
    """c ``[N, D*H]`` of one LSTM layer whose output is y: the operators give that of the last step alone."""

    def compute(x, y, weights, norms, h_0, c_0) -> Tensor:
        return torch_steps.cell_states(x, weights, norms, y, h_0, c_0, batch_sizes, variant)

    again = recompute and modes.wants_gradients(y, c_0, *weights, *norms)
    return with_options.computed(compute, again, x, y, list(weights), list(norms), h_0, c_0)
