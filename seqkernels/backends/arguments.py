"""Arguments of the operators: their checks, and the order of a direction's weights."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqkernels import late_checks
from seqkernels.backends.cells import CELLS
from seqkernels.backends.stack import SavedLayout
from seqkernels.storage import expect_storage

TensorArg = tuple[str, Tensor | None, Sequence[int]]  # its name, what is given, and the shape it is to have


class Weights(NamedTuple):
    """The weights of one direction, None where there is none."""

    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor  # [G*H, P]
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    w_hr: Tensor | None  # [P, H]


class StepMasks(NamedTuple):
    """What one layer with options has besides (`seqkernels.masked_ops`), None where nothing is masked."""

    recurrent: Tensor | None = None  # [D, B, P]
    candidate: Tensor | None = None  # [D, B, H]
    zoneout_h: Tensor | None = None  # [N, D, P]
    zoneout_c: Tensor | None = None  # [N, D, H]

    def saved_blocks(self, cell: str) -> int:
        """K of the layer: an RNN, which saves nothing else, saves the h that zoneout may replace."""
        return CELLS[cell].saved_blocks or int(self.zoneout_h is not None)

    def check(self, cell: str, x: Tensor, h_0: Tensor, hidden_size: int) -> None:
        """csrc says the same in C++.

        Raises:
            RuntimeError: masks that do not fit.
        """
        (D, B, P), N, facts = h_0.shape, x.shape[0], CELLS[cell]
        shapes = (D, B, P), (D, B, hidden_size), (N, D, P), (N, D, hidden_size)
        dtype = torch.promote_types(x.dtype, torch.float32)
        for name, mask, shape in zip(self._fields, self, shapes, strict=True):
            if mask is not None:
                _require(mask.shape == shape, f"{name} is {list(shape)}, got {list(mask.shape)}")
                _require(mask.dtype == dtype, f"{name} is {dtype}, got {mask.dtype}")
                _require(mask.device == x.device and mask.is_contiguous(), f"{name} is contiguous, and where x is")
        expect_storage(*zip(self._fields, self, strict=True))
        _require(facts.saved_blocks > 0 or self.candidate is None, "candidate goes with gated cells only")
        _require(facts.states == 2 or self.zoneout_c is None, "zoneout_c goes with an LSTM only")

    def check_without_norm(self, cell: str, x: Tensor, weights: Sequence[Tensor], h_0: Tensor) -> None:
        """The same of a layer that has no layer norm, after `check`."""
        self.check(cell, x, h_0, weights[0].shape[0] // CELLS[cell].gates)
        projected = len(weights) // len(h_0) % 2 == 1
        _require(self == NO_MASKS or not projected, "there are no kernels with masks and a projection")


NO_MASKS = StepMasks()


def by_direction(weights: Sequence[Tensor], directions: int) -> list[Weights]:
    """Flat weights: w_ih, w_hh, then with bias b_ih, b_hh, then with projection w_hr, for each direction of each
    layer."""
    each = len(weights) // directions
    named = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        b_ih, b_hh = rest[:2] if len(rest) >= 2 else (None, None)
        named.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if len(rest) % 2 else None))
    return named


def check(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    layers: int = 1,
) -> None:
    """Arguments of the operators, before a kernel addresses memory by them; csrc/check.h says the same in C++.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not fit. batch_sizes on a GPU are not looked into, as that would
            wait for it: `late_checks.fitting` makes them fit.
    """
    _require(cell in CELLS, f"unknown cell '{cell}'; the cells are {', '.join(CELLS)}")
    _require(x.dim() == 2, f"x is [rows, input size], got {x.dim()} dimensions")
    _require(h_0.dim() == 3, f"h_0 is [directions, sequences, hidden size], got {h_0.dim()} dimensions")
    I, (LD, B, P), G = x.shape[1], h_0.shape, CELLS[cell].gates  # noqa: E741
    _require(layers > 0 and LD % layers == 0, f"h_0 has {LD} states for {layers} layers")
    D = LD // layers
    _require(D in (1, 2), f"an RNN has one or two directions, got {D}")
    _require(
        len(weights) % LD == 0 and 2 <= len(weights) // LD <= 5,
        f"a direction has w_ih, w_hh, (b_ih, b_hh), (w_hr), got {len(weights)} weights for {LD} directions",
    )
    directions = by_direction(weights, LD)
    projected = directions[0].w_hr is not None
    _require(CELLS[cell].can_project or not projected, "w_hr goes with an LSTM only")
    _require((CELLS[cell].states == 2) == (c_0 is not None), "c_0 goes with an LSTM and only with it")
    _require(weights[0].dim() == 2, "w_ih is [gates * hidden size, input size]")
    GH = weights[0].shape[0]
    H = GH // G
    _require(H * G == GH, f"w_ih has {GH} rows, no multiple of {G} gates")
    _require(projected or P == H, f"h_0 has {P} features, but the hidden size is {H}")
    given: list[TensorArg] = []
    for k, w in enumerate(directions):
        shapes = (GH, I if k < D else D * P), (GH, P), (GH,), (GH,), (P, H)
        given += zip(Weights._fields, w, shapes, strict=True)
    expect(x, *given, ("h_0", h_0, (LD, B, P)), ("c_0", c_0, (LD, B, H)), ("x", x, x.shape))
    check_steps(batch_sizes, x, B)


def check_steps(batch_sizes: Tensor | None, x: Tensor, sequences: int) -> None:
    """batch_sizes, or without them a batch size of all sequences, fit the rows of x; raises RuntimeError."""
    N, B = x.shape[0], sequences
    if batch_sizes is None:
        _require(N == 0 or (B > 0 and N % B == 0), f"{N} rows are no whole number of steps of {B} sequences")
        return
    _require(batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1, "batch_sizes is [steps], int64")
    expect_storage(("batch_sizes", batch_sizes))
    if not late_checks.out_of_sight(batch_sizes):
        sizes = batch_sizes.tolist()
        falling = all(0 <= size <= before for before, size in zip([B, *sizes], sizes, strict=False))
        _require(falling, f"batch_sizes must not rise, be negative, or exceed the {B} sequences of h_0")
        _require(sum(sizes) <= N, f"batch_sizes add up to {sum(sizes)} rows, but x has {N}")
    else:
        _require(batch_sizes.device == x.device, "batch_sizes is neither on the CPU nor where x is")


def check_backward(
    cell: str,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],  # of y, h_n and c_n
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    y: Tensor,
    saved: Tensor,
    layers: int = 1,
    masks: StepMasks = NO_MASKS,
) -> None:
    """What the operator of the backward pass takes besides, after `check`."""
    N, (LD, B, P), H = x.shape[0], h_0.shape, weights[0].shape[0] // CELLS[cell].gates
    D = LD // layers
    grad_y, grad_h_n, grad_c_n = grads
    layout = SavedLayout.of(cell, x, weights, h_0, layers)._replace(blocks=masks.saved_blocks(cell) * H)
    expect(
        x,
        ("y", y, (N, D * P)),
        ("saved", saved, layout.shape()),
        ("grad_y", grad_y, (N, D * P)),
        ("grad_h_n", grad_h_n, (LD, B, P)),
        ("grad_c_n", grad_c_n, (LD, B, 0 if c_0 is None else H)),
    )


def expect(x: Tensor, *arguments: TensorArg) -> None:
    """Those that are given have their shapes, the memory for them, and the dtype and device of x; else RuntimeError."""
    for name, tensor, shape in arguments:
        if tensor is not None:
            _require(tensor.shape == shape, f"{name} is {list(shape)}, got {list(tensor.shape)}")
            _require(tensor.dtype == x.dtype, f"{name} has another dtype than x")
            _require(tensor.device == x.device, f"{name} is on another device than x")
    expect_storage(*((name, tensor) for name, tensor, _ in arguments))


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise RuntimeError(sentence)
