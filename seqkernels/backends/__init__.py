"""The implementations of the operator pair, one module each, registered by ``seqkernels.ops``.

Here stands what they share: the sizes of cells, and the order of a direction's weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
# Blocks of H columns in `saved`: the contract between any forward and any backward.
SAVED_BLOCKS = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}


class Weights(NamedTuple):
    """The weights of one direction, None where there is none."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


def by_direction(weights: Sequence[Tensor], directions: int) -> list[Weights]:
    """A layer's flat weights: w_ih, w_hh, then with bias b_ih, b_hh, then with projection w_hr, for each direction."""
    each = len(weights) // directions
    named = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
        named.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None))
    return named
