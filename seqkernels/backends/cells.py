"""The cells: what everything outside their algebra must know of them, each fact once.

The algebra of a step stands in `torch_eager` (torch operations), in `triton/algebra.py` and in csrc/cells.h, its
specification in `seqkernels.reference`.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """One kind of cell."""

    name: str  # in operators, kernels and plans
    display_name: str  # of its module, in messages
    gates: int  # G: w_ih and w_hh have G*H rows
    saved_blocks: int  # K: blocks of H columns in `saved`, the contract between any forward and any backward
    states: int = 1  # 2: c beside h
    can_project: bool = False  # h may be projected to fewer features, by w_hr
    needs_h_prev: bool = False  # a step reads h beside its products, and its backward pass the h before it
    # The gates, always the last ones, in which W_ih x and W_hh h do not just add up, so that each has a gradient of
    # its own. A backward sweep writes `gates` + `gates_apart` blocks of gradients: first those of W_hh h, then those of
    # W_ih x that differ from them.
    gates_apart: int = 0


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", "RNN", gates=1, saved_blocks=0),  # y is enough
        Cell("rnn_relu", "RNN", gates=1, saved_blocks=0),
        Cell("gru", "GRU", gates=3, saved_blocks=4, gates_apart=1, needs_h_prev=True),  # r, z, n, and W_hn h + b_hn
        Cell("lstm", "LSTM", gates=4, saved_blocks=5, states=2, can_project=True),  # i, f, g, o, and c
        Cell("ligru", "LiGRU", gates=2, saved_blocks=2, needs_h_prev=True),  # a, z
    )
}
