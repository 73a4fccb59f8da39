"""torch.onnx.export(dynamo=True): a layer becomes the ONNX operator GRU, LSTM or RNN.

Source of the operators: https://onnx.ai/onnx/operators. What they take in another order than torch.nn is put in order
in the graph, by operations on weights that the exporter folds.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks
from seqkernels.backends import stack
from seqkernels.backends.arguments import Weights, by_direction
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State

# ONNX's order of gates, as places in torch's: GRU r z n -> z r h, LSTM i f g o -> i o f c.
_GATES = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


def exporting() -> bool:
    """Whether torch.onnx.export(dynamo=True) records the call."""
    if not torch.compiler.is_exporting():
        return False
    # Not torch.onnx.is_in_onnx_export: the exporter tries a failed model again by Dynamo, which says False of it, and
    # then there is another message than ours. Imported here, as torch.onnx takes a tenth of a second.
    from torch.onnx._internal.exporter import _flags

    return _flags._is_onnx_exporting


def check_no_options(parts) -> None:
    if parts is not None and parts.cell_options.given():
        raise ValueError(
            f"ONNX has no operator with {', '.join(parts.cell_options.given())}: export without cell_options"
        )


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: State | None,
    weights: Sequence[Tensor],
    num_layers: int,
    directions: int,
    dropout: float,
    batch_first: bool,
    lengths: Tensor | Sequence[int] | None,
    cu_seqlens: Tensor | None,
    bias: bool,
) -> tuple[Tensor, State]:
    """`seqkernels.functional.recurrent` as ONNX operators, one for each layer.

    Raises:
        ValueError: what ONNX has no operator for: other cells than torch.nn's, proj_size, a PackedSequence, cu_seqlens.
    """
    count = num_layers * directions
    _check(cell, input, weights, count, cu_seqlens)
    assert isinstance(input, Tensor)
    unbatched, _ = checks.check_call(cell, input, hx, weights, count, bias, lengths, None)
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if unbatched:
        input, states = input.unsqueeze(1), tuple(state.unsqueeze(1) for state in states)
    elif batch_first:
        input = input.transpose(0, 1)
    if lengths is not None:
        lengths = torch.as_tensor(lengths).to(torch.int32)
    ends = []
    for layer, (of_layer, *own) in enumerate(stack.each(num_layers, weights, *states)):
        if layer and dropout > 0:
            input = F.dropout(input, dropout, True)
        input, *end = _layer(cell, input, own, by_direction(of_layer, directions), lengths)
        ends.append(end)
    ended = [torch.cat(end) for end in zip(*ends, strict=True)]
    if lengths is not None and states:  # what never runs keeps its state, of which ONNX says nothing
        never = (lengths == 0).reshape(1, -1, 1)
        ended = [torch.where(never, *pair) for pair in zip(states, ended, strict=True)]
    if unbatched:
        input, ended = input.squeeze(1), [state.squeeze(1) for state in ended]
    elif batch_first:
        input = input.transpose(0, 1)
    return input, ended[0] if len(ended) == 1 else (ended[0], ended[1])


def step(cell: str, x: Tensor, h_0: Tensor, c_0: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One step of a cell, x ``[B, I]`` -> (h, c), as a layer's."""
    hx = h_0.unsqueeze(0) if c_0 is None else (h_0.unsqueeze(0), c_0.unsqueeze(0))
    _, end = recurrent(cell, x.unsqueeze(0), hx, weights, 1, 1, 0.0, False, None, None, len(weights) > 2)
    return (end.squeeze(0), end[:0]) if isinstance(end, Tensor) else (end[0].squeeze(0), end[1].squeeze(0))


def check_no_reset(reset) -> None:
    if reset is not None:
        raise ValueError("ONNX's operators know no resets: cut the sequences, and give lengths=")


def _check(cell: str, input, weights: Sequence[Tensor], count: int, cu_seqlens: Tensor | None) -> None:
    if cell not in _GATES:
        raise ValueError(f"ONNX has no operator for {CELLS[cell].display_name}")
    if len(weights) // count % 2:
        raise ValueError("ONNX's LSTM has no projection (proj_size)")
    if isinstance(input, PackedSequence) or cu_seqlens is not None:
        raise ValueError("ONNX has padded batches alone: give lengths= instead of a PackedSequence or cu_seqlens")


def _layer(
    cell: str,
    x: Tensor,  # [T, B, I]
    states: Sequence[Tensor],  # [D, B, H] each, or none
    weights: Sequence[Weights],
    lengths: Tensor | None,  # [B] int32
) -> Sequence[Tensor]:
    """y ``[T, B, D*H]`` and the final states ``[D, B, H]``."""
    (steps, sequences, _), hidden, directions = x.shape, weights[0].w_hh.shape[1], len(weights)
    own: dict = {
        "gru": {"linear_before_reset": 1},
        "lstm": {},
        "rnn_tanh": {"activations": ["Tanh"] * directions},
        "rnn_relu": {"activations": ["Relu"] * directions},
    }
    bias = None
    if weights[0].b_ih is not None:
        bias = torch.stack([torch.cat([_ordered(cell, w.b_ih), _ordered(cell, w.b_hh)]) for w in weights])
    y, *ends = torch.onnx.ops.symbolic_multi_out(
        cell.partition("_")[0].upper(),
        [
            x,
            torch.stack([_ordered(cell, w.w_ih) for w in weights]),
            torch.stack([_ordered(cell, w.w_hh) for w in weights]),
            bias,
            lengths,
            *states,
        ],
        {"hidden_size": hidden, "direction": "bidirectional" if directions == 2 else "forward", **own[cell]},
        dtypes=[x.dtype] * (1 + CELLS[cell].states),
        shapes=[(steps, directions, sequences, hidden)] + [(directions, sequences, hidden)] * CELLS[cell].states,
    )
    return y.transpose(1, 2).reshape(steps, sequences, directions * hidden), *ends


def _ordered(cell: str, weight: Tensor | None) -> Tensor:
    """A weight or bias with its gates in ONNX's order."""
    assert weight is not None
    size = len(weight) // len(_GATES[cell])
    return torch.cat([weight[place * size : (place + 1) * size] for place in _GATES[cell]])
