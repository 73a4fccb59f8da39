"""Calls of the operators of layers with layer norm (`seqkernels.layer_norm_ops`) by kernels for GPUs, beside the torch
operations that tests/modules/test_cell_options.py judges, in float64."""

from collections.abc import Sequence

import torch
from operators import to_float64
from torch import Tensor

from seqkernels._ops import ops
from seqkernels.backends import torch_steps
from seqkernels.backends.cells import CELLS
from seqkernels.backends.torch_steps import Direction, Variant
from seqkernels.double_backward import derivatives

BATCH_SIZES = 4, 3, 0


def arguments(
    cell: str,
    of_sum: bool,
    masked: bool,
    batch_sizes: tuple[int, ...] | None = BATCH_SIZES,
    spare: int = 1,
    bias: bool = True,
    hidden: int = 5,
    directions: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[list, list]:
    """Those with gradients, and those behind them. Without batch sizes three steps of four sequences."""
    torch.manual_seed(0)
    D, H, GH = directions, hidden, CELLS[cell].gates * hidden
    B, N = (4, 12) if batch_sizes is None else (batch_sizes[0], sum(batch_sizes) + spare)
    has_c, norms_c = cell == "lstm", cell == "lstm" and not of_sum

    def random(*size: int, wanted: bool = True):
        return torch.randn(size, dtype=dtype) if wanted else None

    def mask(*size: int, wanted: bool = True):
        return torch.rand(size, dtype=dtype) if masked and wanted else None

    layer = [
        random(N, D, GH),
        random(D, GH, H) / 2,
        random(D, GH),
        random(D, GH, wanted=bias),
        random(D, H, wanted=norms_c),
        random(D, H, wanted=norms_c and bias),
        random(D, B, H),
        random(D, B, H, wanted=has_c),
    ]
    masks = [
        mask(D, B, H),
        mask(D, B, H, wanted=CELLS[cell].saved_blocks > 0),
        mask(N, D, H),
        mask(N, D, H, wanted=has_c),
    ]
    return layer, [None if batch_sizes is None else torch.tensor(batch_sizes), *masks, of_sum]


def both_passes(
    backend: str, cell: str, layer: list, rest: list, launch: Sequence[int] = (0,)
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results and the gradients of `layer`; and the gradients of the results."""
    ours = [t if t is None else t.clone().requires_grad_() for t in layer]
    y, h_n, c_n, *_ = getattr(ops.layer_norm_forward, backend)(cell, *ours, *rest, True, list(launch))
    torch.manual_seed(1)
    grads = [torch.randn_like(y), torch.randn_like(h_n), torch.randn_like(c_n) if cell == "lstm" else None]
    wanted = [t for t in ours if t is not None]
    return [y, h_n, c_n, *derivatives((y, h_n, c_n), grads, wanted, [True] * len(wanted), False)], grads


def by_torch(cell: str, layer: list, batch_sizes: Tensor | None, masks: list, of_sum: bool) -> tuple:
    """y, h_n and c_n by torch's operations, which have gradients."""
    gates_x, *parameters, h_0, c_0 = layer
    directions = [
        Direction(of_x, *(None if t is None else t[d] for t in parameters)) for d, of_x in enumerate(gates_x.unbind(1))
    ]
    blocks = h_0.shape[2] // parameters[0].shape[2] if h_0.shape[2] else 1
    variant = Variant("gates" if of_sum else True, blocks, *masks)
    return torch_steps.sweep(cell, directions, h_0, c_0, batch_sizes, variant)


def results(backend: str, cell: str, layer: list, rest: list, launch: Sequence[int] = (0,)) -> tuple[list, list]:
    """Outputs and gradients, ours and in float64."""
    found, grads = both_passes(backend, cell, layer, rest, launch)
    exact = [t if t is None else t.double().requires_grad_() for t in layer]
    batch_sizes, *masks, of_sum = rest
    right = by_torch(cell, exact, batch_sizes, to_float64(masks), of_sum)
    wanted = [t for t in exact if t is not None]
    return found, [*right, *derivatives(right, to_float64(grads), wanted, [True] * len(wanted), False)]


def assert_rounding_alone(found: list, right: list) -> None:
    for value, exact in zip(found, right, strict=True):
        eps = torch.finfo(value.dtype).eps
        assert (value.double() - exact).norm() <= 16 * eps * exact.norm().clamp(min=1e-30)
