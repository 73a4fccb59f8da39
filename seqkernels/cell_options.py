"""Options of cells beyond torch.nn: zoneout, dropout within the recurrence, layer norm, and blocks (docs/cells.md).

Here stand what they are, their checks, and the one place where masks are drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels.backends.cells import CELLS

NORMS = (False, True, "gates")


@dataclass(frozen=True)
class CellOptions:
    """Options of the cells of a layer, which are the same in all of its layers and directions (docs/cells.md).

    Masks are drawn in training alone, from torch's generator; probabilities are in [0, 1), and 0 is off.

    Args:
        zoneout: probability that a unit keeps its state for a step; of LSTM one for h and c, or (that of h, that of c).
            Not in training, each state is the mean: p times the old one, and 1 - p times the new one.
        recurrent_dropout: of h in the products with W_hh; one mask for each sequence and direction.
        candidate_dropout: of what a step adds to the state, before its gate: LSTM's g, GRU's n, LiGRU's a; one mask
            for each sequence and direction.
        input_dropout: of the input of each layer; one mask for each sequence.
        weight_dropout: of the elements of W_hh; one mask for each call.
        layer_norm: True normalizes W_ih x and W_hh h, each over all gates, and c of LSTM where h is read from it;
            "gates" the sum of the two products. Learned scales are parameters, the biases are the shifts.
        blocks: k equal blocks of units without a connection by W_hh, which is ``[G*H, H/k]``: the rows of torch.nn's,
            each with the columns of its unit's block alone.

    Raises:
        TypeError, ValueError: probabilities that are no numbers in [0, 1), another layer_norm, no positive blocks.
    """

    zoneout: float | tuple[float, float] = 0.0
    recurrent_dropout: float = 0.0
    candidate_dropout: float = 0.0
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    layer_norm: bool | str = False
    blocks: int = 1

    def __post_init__(self) -> None:
        for name in DROPOUTS:
            _check_probability(name, getattr(self, name))
        if isinstance(self.zoneout, Sequence) and not isinstance(self.zoneout, str):
            if len(self.zoneout) != 2:
                raise ValueError(f"zoneout is one probability, or that of h and that of c, got {len(self.zoneout)}")
            object.__setattr__(self, "zoneout", tuple(self.zoneout))  # lists compare and hash otherwise
        for probability in self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,):
            _check_probability("zoneout", probability)
        if not any(self.layer_norm is norm for norm in NORMS[:2]) and self.layer_norm != "gates":
            raise ValueError(f"layer_norm is True, False or 'gates', got {self.layer_norm!r}")
        if not isinstance(self.blocks, int) or isinstance(self.blocks, bool):
            raise TypeError(f"blocks is a number of blocks, got {self.blocks!r}")
        if self.blocks < 1:
            raise ValueError(f"blocks is at least 1, got {self.blocks}")

    def given(self) -> dict:
        """Those that are not off."""
        default = CellOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}

    def of_step(self, training: bool, projected: bool = False) -> tuple[str, ...]:
        """Those for which a step computes something else, so that a backend has to have them itself; and, as names of
        their own, `proj_size` and `blocks` where it has to have both together."""
        names = ["zoneout"] if any(self.zoneouts) else []
        names += [name for name in ("recurrent_dropout", "candidate_dropout") if training and getattr(self, name)]
        names += ["layer_norm"] if self.layer_norm else []
        names += ["proj_size"] if names and projected else []
        return (*names, *(["blocks"] if self.layer_norm and self.blocks > 1 else []))

    @property
    def zoneouts(self) -> tuple[float, float]:
        """Of h, and of c."""
        return self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout)

    def norm_sizes(self, cell: str, hidden_size: int, bias: bool, projected: bool) -> dict[str, int]:
        """The parameters of layer norm that a direction has: scales, which begin as ones, and the shift of c, zeros.

        Raises:
            ValueError: options that this cell, or one of these sizes, cannot have.
        """
        self._check_cell(cell, hidden_size, projected)
        gates, has_c = CELLS[cell].gates * hidden_size, CELLS[cell].states == 2
        if not self.layer_norm:
            return {}
        if self.layer_norm == "gates":
            return {"scale": gates}
        sizes = {"scale_ih": gates, "scale_hh": gates}
        if has_c:
            sizes |= {"scale_c": hidden_size} | ({"shift_c": hidden_size} if bias else {})
        return sizes

    def _check_cell(self, cell: str, hidden_size: int, projected: bool) -> None:
        name = CELLS[cell].display_name
        if isinstance(self.zoneout, tuple) and CELLS[cell].states == 1:
            raise ValueError(f"zoneout of two probabilities is for LSTM, which has two states; {name} has one")
        if self.candidate_dropout and CELLS[cell].gates == 1:
            raise ValueError("candidate_dropout is for gated cells: of an RNN the candidate is the state itself")
        if self.blocks > 1 and projected:
            raise ValueError("blocks go with no proj_size: a projection connects all units")
        if hidden_size % self.blocks:
            raise ValueError(f"blocks divide hidden_size: {hidden_size} units are no {self.blocks} equal blocks")


DROPOUTS = ("recurrent_dropout", "candidate_dropout", "input_dropout", "weight_dropout")


def _check_probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a probability, got {value!r}")
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{name} is a probability in [0, 1), got {value}")


class Masks(NamedTuple):
    """What multiplies what in one layer, None where nothing does; sequences and rows are in the order of the rows.

    Those of dropout are 0 or 1 / (1 - p). Those of zoneout say how much of the old state stays: 0 or 1 in training,
    else the probability.
    """

    input: Tensor | None = None  # [B, I]
    recurrent: Tensor | None = None  # [D, B, P]
    candidate: Tensor | None = None  # [D, B, H]
    zoneout_h: Tensor | None = None  # [N, D, P]
    zoneout_c: Tensor | None = None  # [N, D, H]


def draw(options: CellOptions, training: bool, x: Tensor, h_0: Tensor, c_0: Tensor | None) -> Masks:
    """Masks for one layer, from torch's generator, always in the same order; x ``[N, I]``, h_0 ``[D, B, P]``."""
    directions, sequences, projected = h_0.shape
    hidden_size = projected if c_0 is None else c_0.shape[2]
    rows = x.shape[0], directions

    def dropout(p: float, *size: int) -> Tensor | None:
        return dropout_mask(p, size, x) if training and p else None

    def zoneout(p: float, *size: int) -> Tensor | None:
        return None if not p else _stays(p, size, x) if training else x.new_full((), p, dtype=_dtype(x)).expand(size)

    of_h, of_c = options.zoneouts
    return Masks(
        dropout(options.input_dropout, sequences, x.shape[1]),
        dropout(options.recurrent_dropout, directions, sequences, projected),
        dropout(options.candidate_dropout, directions, sequences, hidden_size),
        zoneout(of_h, *rows, projected),
        None if c_0 is None else zoneout(of_c, *rows, hidden_size),
    )


def dropout_mask(p: float, size: Sequence[int], like: Tensor) -> Tensor:
    """0, or 1 / (1 - p)."""
    return (~_drawn(p, size, like)).to(_dtype(like)) / (1 - p)


def _stays(p: float, size: Sequence[int], like: Tensor) -> Tensor:
    return _drawn(p, size, like).to(_dtype(like))


def _drawn(p: float, size: Sequence[int], like: Tensor) -> Tensor:
    # Not in place: torch.vmap(randomness="different") knows of a factory that each member has its own.
    return torch.rand(size, device=like.device, dtype=torch.float32) < p


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
