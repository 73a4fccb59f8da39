"""Layers with cell options, and beside their specification: the masks that were drawn, as it takes them."""

from contextlib import contextmanager

import torch
from cases import CELLS
from torch import Tensor

import seqkernels as sk
from seqkernels import cell_options, reference, with_options
from seqkernels.backends.cells import CELLS as FACTS
from seqkernels.varlen import Rows

OPTIONS = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "candidate": {"candidate_dropout": 0.4},
    "input": {"input_dropout": 0.4},
    "weight": {"weight_dropout": 0.4},
    "norm": {"layer_norm": True},
    "norm of gates": {"layer_norm": "gates"},
    "blocks": {"blocks": 3},
    "blocks and masks": {"blocks": 2, "input_dropout": 0.3, "weight_dropout": 0.2},
    "all": {"zoneout": 0.2, "recurrent_dropout": 0.3, "input_dropout": 0.3, "weight_dropout": 0.2, "layer_norm": True},
    "all blocks": {"zoneout": 0.2, "recurrent_dropout": 0.3, "layer_norm": "gates", "blocks": 2},
}
LENGTHS = (2, 0, 4)


def options_of(cell: str) -> list[str]:
    return [name for name in OPTIONS if not (name == "candidate" and cell.startswith("rnn"))]


EACH = [(cell, name) for cell in CELLS for name in options_of(cell)]


def layer_of(cell: str, name: str = "all", dtype=torch.float64, **more):
    torch.manual_seed(0)
    more |= {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype} | more
    layer = getattr(sk, FACTS[cell].display_name)(4, 6, **options, **(OPTIONS[name] if name else {}))
    with torch.no_grad():  # so that no scale is a one that could as well be left out
        for norm in layer._norm_names:
            getattr(layer, norm).add_(torch.randn_like(getattr(layer, norm)), alpha=0.3)
    return layer


def as_tuple(state) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else tuple(state)


def states_of(layer):
    torch.manual_seed(3)
    sizes = [layer.proj_size or 6, 6][: FACTS[layer.mode.lower()].states]
    return tuple(torch.randn(4, 3, size, dtype=layer.weight_ih_l0.dtype) for size in sizes)


class Drawn:
    """What calls have drawn: masks of each layer, those of weights, and the rows that they are for."""

    def __init__(self) -> None:
        self.masks: list[cell_options.Masks] = []
        self.weights: list[Tensor] = []
        self.rows: Rows | None = None


@contextmanager
def recording():
    drawn, draw, plan_of, dropout_mask = Drawn(), cell_options.draw, with_options.plan_of, cell_options.dropout_mask

    def of_layer(*args) -> cell_options.Masks:
        drawn.masks.append(draw(*args))
        return drawn.masks[-1]

    def of_weight(p, size, like) -> Tensor:
        mask = dropout_mask(p, size, like)
        if getattr(like, "dim", int)() == 2 and tuple(size) == tuple(like.shape) and like.requires_grad:
            drawn.weights.append(mask)
        return mask

    def of_rows(inputs, *args):
        drawn.rows = inputs.rows
        return plan_of(inputs, *args)

    cell_options.draw, with_options.plan_of, cell_options.dropout_mask = of_layer, of_rows, of_weight
    try:
        yield drawn
    finally:
        cell_options.draw, with_options.plan_of, cell_options.dropout_mask = draw, plan_of, dropout_mask


def assert_derivatives(layer, x: Tensor) -> None:
    """First and second ones of a layer in float64, which draws the same masks in every call."""

    def run(*_):
        torch.manual_seed(1)
        return layer(x)[0]

    inputs = x, *layer.parameters()
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def as_specified(masks: cell_options.Masks, rows: Rows, lengths) -> reference.Masks:
    """Masks in the user's order of sequences, those of rows by sequence and step."""
    order = torch.arange(rows.sequences) if rows.unsorted_indices is None else rows.unsorted_indices.cpu()

    def of_sequences(mask: Tensor | None, at: int) -> Tensor | None:
        return None if mask is None else mask.index_select(at, order)

    def of_rows(mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        steps = max(lengths, default=0)
        sizes = [rows.sequences] * steps if rows.batch_sizes is None else rows.batch_sizes.tolist()
        starts = [sum(sizes[:t]) for t in range(steps)]
        found = mask.new_zeros(mask.shape[1], len(lengths), steps, mask.shape[2])
        for b, length in enumerate(lengths):
            for t in range(length):
                found[:, b, t] = mask[starts[t] + int(order[b])]
        return found

    return reference.Masks(
        of_sequences(masks.input, 0),
        of_sequences(masks.recurrent, 1),
        of_sequences(masks.candidate, 1),
        of_rows(masks.zoneout_h),
        of_rows(masks.zoneout_c),
    )


def specified(layer, sequences, states, drawn: Drawn, lengths):
    """(outputs, h_n, c_n) of a layer that has drawn its masks; differentiable by its own parameters."""
    options = layer.cell_options
    weights = [getattr(layer, name) for name in layer._flat_weights_names]
    masks = iter(drawn.weights)
    weights = [
        w * next(masks) if drawn.weights and name.startswith("weight_hh") else w
        for name, w in zip(layer._flat_weights_names, weights, strict=True)
    ]
    return reference.forward(
        layer.mode.lower(),
        sequences,
        states[0],
        states[1] if len(states) == 2 else None,
        weights,
        bias=layer.bias,
        num_layers=layer.num_layers,
        bidirectional=layer.bidirectional,
        masks=[as_specified(of_layer, drawn.rows, lengths) for of_layer in drawn.masks],
        layer_norm=options.layer_norm,
        norms=[getattr(layer, name) for name in layer._norm_names],
        blocks=options.blocks,
    )
