"""The specification of quantized layers, in plain torch operations: sums of integers are exact, in float64."""

import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.quantized import quantize_rows


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Rows x ``[n, K]`` float32, weight int8 ``[G, K]``, its scales ``[G]`` -> ``[n, G]`` in float64."""
    integers, of_rows = quantize_rows(x)
    sums = integers.double() @ weight.double().T
    result = sums * (of_rows.double().unsqueeze(1) * scale.double())
    return result if bias is None else result + bias.double()


def step(cell: str, x: Tensor, h: Tensor, c: Tensor | None, weights: dict, suffix: str) -> tuple[Tensor, Tensor | None]:
    """One step of one layer and direction for rows x ``[B, I]``, h ``[B, P]``, c ``[B, H]``, all float32.

    weights: a state dict of a quantized layer; suffix: of its names, "_l0" say."""

    def of(name: str, rows: Tensor, bias: str) -> Tensor:
        name, bias = f"weight_{name}{suffix}", f"bias_{bias}{suffix}"
        return product(rows, weights[name], weights[f"{name}_scale"], weights.get(bias))

    gates_x, gates_h = of("ih", x, "ih"), of("hh", h, "hh")
    new = [
        reference.activate(cell, gx, gh, hb.double(), cb if cb is None else cb.double())
        for gx, gh, hb, cb in zip(gates_x, gates_h, h, c if c is not None else [None] * len(h), strict=True)
    ]
    h_new, c_new = torch.stack([one[0] for one in new]), None if c is None else torch.stack([one[1] for one in new])
    if f"weight_hr{suffix}" in weights:
        h_new = of("hr", h_new.float(), "hr")
    return h_new, c_new
