"""How the Triton kernels of layers with layer norm are launched, on the two paths of ``host``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels import hardware
from seqkernels.backends.arguments import StepMasks, check_steps, expect
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.triton import gradients
from seqkernels.backends.triton.host import given_or_zeros
from seqkernels.backends.triton.layer import Layer
from seqkernels.backends.triton.tiles import launch_of
from seqkernels.late_checks import fitting


def layer_norm_forward(
    cell, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes, recurrent, candidate, zoneout_h,
    zoneout_c, of_sum, save, launch,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer: `seqkernels.layer_norm_ops`."""
    masks, parameters = StepMasks(recurrent, candidate, zoneout_h, zoneout_c), (scale, shift, scale_c, shift_c)
    layer = _layer(cell, gates_x, w_hh, parameters, h_0, c_0, batch_sizes, masks, launch)
    # Rows that no step uses come out as zeros.
    new = gates_x.new_empty if batch_sizes is None else gates_x.new_zeros
    y = new(layer.N, layer.D * layer.H)
    saved = new(layer.N, layer.D, _blocks(layer) * layer.H if save else 0)
    statistics = new(layer.N, layer.D, _statistics(scale_c) if save else 0)
    h_n = h_0.clone(memory_format=torch.contiguous_format)
    c_n = h_0.new_zeros(layer.D, layer.B, 0) if c_0 is None else c_0.clone(memory_format=torch.contiguous_format)
    if layer.has_work:
        of_layer = _of_layer(layer, gates_x, parameters, of_sum)
        with layer.guard():
            _sweep(layer, of_layer, w_hh, h_n, c_n, y, saved, statistics, save)
    return y, h_n, c_n, saved, statistics


def _sweep(layer: Layer, of_layer, w_hh, h_n, c_n, y, saved, statistics, save) -> None:
    if layer.tile.resident:
        layer.launch(
            "norm_resident_forward", _grid(layer, layer.B), w_hh=w_hh.contiguous(), h_n=h_n, c_n=c_n, y=y, saved=saved,
            statistics=statistics, SAVE=save, PRECISION=layer.precision, **of_layer,
        )  # fmt: skip
        return
    recurrent, w_hh = layer.masks.recurrent, w_hh.mT
    factors = h_n if recurrent is None else h_n * recurrent
    gates_h = y.new_empty(layer.D, layer.B, layer.G * layer.H)
    for k, rows in layer.steps():
        torch.bmm(factors[:, :rows], w_hh, out=gates_h[:, :rows])
        layer.launch(
            "norm_step_forward", _grid(layer, rows), gates_h=gates_h, h=h_n, c=c_n,
            factors=None if recurrent is None else factors, y=y, saved=saved, statistics=statistics, k=k, SAVE=save,
            **of_layer,
        )  # fmt: skip


def layer_norm_backward(
    cell, grad_y, grad_h_n, grad_c_n, gates_x, w_hh, scale, shift, scale_c, shift_c, h_0, c_0, batch_sizes, recurrent,
    candidate, zoneout_h, zoneout_c, of_sum, y, saved, statistics, wants_w_hh, launch,
) -> tuple[Tensor, ...]:  # fmt: skip
    masks, parameters = StepMasks(recurrent, candidate, zoneout_h, zoneout_c), (scale, shift, scale_c, shift_c)
    layer = _layer(cell, gates_x, w_hh, parameters, h_0, c_0, batch_sizes, masks, launch)
    N, D, H, GH, apart = layer.N, layer.D, layer.H, layer.G * layer.H, layer.cell.gates_apart and not of_sum
    grad_c_n = None if c_0 is None else grad_c_n
    expect(
        gates_x,
        ("y", y, (N, D * H)),
        ("saved", saved, (N, D, _blocks(layer) * H)),
        ("statistics", statistics, (N, D, _statistics(scale_c))),
        ("grad_y", grad_y, (N, D * H)),
        ("grad_h_n", grad_h_n, h_0.shape),
        ("grad_c_n", grad_c_n, h_0.shape),
    )
    # Rows that no step uses have no gradient.
    new = gates_x.new_empty if batch_sizes is None else gates_x.new_zeros
    grad_normed, grad_sums = new(N, D, GH), new(N, D, GH)
    grad_last = new(N, D, H) if apart else None
    of_norm_c = None if scale_c is None else new(N, D, 2 * H)
    grad_h = given_or_zeros(grad_h_n, tuple(h_0.shape), gates_x, torch.float32)
    grad_c = given_or_zeros(grad_c_n, (0,) if c_0 is None else tuple(c_0.shape), gates_x, torch.float32)
    if layer.has_work:
        of_layer = _of_layer(layer, gates_x, parameters, of_sum)
        results = {"grad_normed": grad_normed, "grad_sums": grad_sums, "grad_last": grad_last, "of_norm_c": of_norm_c}
        states = {"h_0": h_0.contiguous(), "c_0": (h_0 if c_0 is None else c_0).contiguous()}
        y, saved, statistics = y.contiguous(), saved.contiguous(), statistics.contiguous()
        kept = {"y": y, "saved": saved, "statistics": statistics}
        with layer.guard():
            _sweep_back(layer, of_layer | results | states | kept, w_hh, grad_y, grad_h, grad_c)
    grad_gates_x = grad_normed if grad_last is None else torch.cat([grad_normed[:, :, : GH - H], grad_last], 2)
    of_c = (None, None) if of_norm_c is None else [of.sum(0) for of in of_norm_c.split(H, 2)]
    others = (shift, grad_normed.sum(0)), (scale_c, of_c[0]), (shift_c, of_c[1])
    return (
        grad_sums if of_sum else grad_gates_x,
        _grad_w_hh(layer, h_0, y, grad_sums) if wants_w_hh else w_hh.new_empty(0),
        (grad_normed * saved[:, :, :GH]).sum(0),
        *(w_hh.new_empty(0) if parameter is None else grad for parameter, grad in others),
        grad_h,
        grad_c,
    )


def _sweep_back(layer: Layer, of_layer, w_hh, grad_y, grad_h, grad_c) -> None:
    grads = {"grad_y": of_layer["y"] if grad_y is None else grad_y.contiguous(), "HAS_GRAD_Y": grad_y is not None}
    grads |= {"grad_h": grad_h, "grad_c": grad_c}
    if layer.tile.resident:
        more = {"w_hh": w_hh.contiguous(), "PRECISION": layer.precision}
        layer.launch("norm_resident_backward", _grid(layer, layer.B), **of_layer, **grads, **more)
        return
    masked = layer.masks.recurrent is not None
    grad_step = w_hh.new_empty(layer.D, layer.B, layer.G * layer.H)
    grad_factors = torch.zeros_like(grad_h) if masked else grad_h
    grads |= {"grad_factors": grad_factors if masked else None, "grad_step": grad_step}
    for k, rows in layer.steps(back=True):
        layer.launch("norm_step_backward", _grid(layer, rows), k=k, **of_layer, **grads)
        grad_factors[:, :rows].baddbmm_(grad_step[:, :rows], w_hh)
    if masked:
        grad_h.addcmul_(grad_factors, layer.masks.recurrent)


def _grad_w_hh(layer: Layer, h_0: Tensor, y: Tensor, grad_sums: Tensor) -> Tensor:
    H = layer.H
    if not layer.has_work:
        return grad_sums.new_zeros(layer.D, layer.G * H, H)
    factors = [gradients.factors(layer, y[:, d * H : (d + 1) * H], h_0[d], d) for d in range(layer.D)]
    return torch.stack([grad_sums[:, d].t() @ h for d, h in enumerate(factors)])


# ---- small things


def _layer(cell, gates_x, w_hh, parameters, h_0, c_0, batch_sizes, masks: StepMasks, launch: Sequence[int]) -> Layer:
    """The sizes of the call, checked."""
    if gates_x.dtype != torch.float32 or cell not in CELLS or gates_x.dim() != 3 or h_0.dim() != 3:
        got = f"{gates_x.dtype}, gates_x of {gates_x.dim()} and h_0 of {h_0.dim()} dimensions and {cell}"
        raise RuntimeError(
            "layer norm in Triton takes float32, gates_x [N, D, G*H], h_0 [D, B, H] and a cell of "
            f"{', '.join(CELLS)}, got {got}"
        )
    _, _, scale_c, shift_c = parameters
    for holds, sentence in (
        (h_0.shape[0] in (1, 2), f"an RNN has one or two directions, got {h_0.shape[0]}"),
        ((CELLS[cell].states == 2) == (c_0 is not None), "c_0 goes with an LSTM and only with it"),
        (c_0 is not None or scale_c is None, "scale_c goes with an LSTM only"),
        (scale_c is not None or shift_c is None, "shift_c goes with scale_c"),
    ):
        if not holds:
            raise RuntimeError(sentence)
    (D, B, H), N, GH = h_0.shape, gates_x.shape[0], CELLS[cell].gates * h_0.shape[2]
    shapes = {"gates_x": (N, D, GH), "w_hh": (D, GH, H), "scale": (D, GH), "shift": (D, GH)}
    shapes |= {"scale_c": (D, H), "shift_c": (D, H), "h_0": (D, B, H), "c_0": (D, B, H)}
    tensors = gates_x, w_hh, *parameters, h_0, c_0
    expect(gates_x, *zip(shapes, tensors, shapes.values(), strict=True))
    check_steps(batch_sizes, gates_x, B)
    masks.check(cell, gates_x, h_0, H)
    if len(launch) < 2 and H:  # nothing was planned
        options = ("layer_norm", *(name for name, mask in masks._asdict().items() if mask is not None))
        tf32 = hardware.tf32(gates_x.device)
        call = Call(cell, gates_x.device.type, gates_x.dtype, hidden_size=H, tf32=tf32, options=options)
        launch = tuple(map(int, launch_of(call, hardware.gpu_of(gates_x.device))))
    weights = [t for own in w_hh for t in (own, own)]  # of which w_ih is not read
    x = gates_x.flatten(1)
    return Layer(cell, x, weights, h_0, fitting(x, h_0, batch_sizes), launch, masks)


def _of_layer(layer: Layer, gates_x: Tensor, parameters, of_sum: bool) -> dict[str, Any]:
    """Arguments of both passes."""
    scale, shift, scale_c, shift_c = (None if tensor is None else tensor.contiguous() for tensor in parameters)
    return {
        "gates_x": gates_x.contiguous(),
        "scale": scale,
        "shift": shift,
        "scale_c": scale_c,
        "shift_c": shift_c,
        "SAVED": _blocks(layer),
        "STATISTICS": _statistics(scale_c),
        "OF_SUM": of_sum,
    }


def _blocks(layer: Layer) -> int:
    """Saved for each unit: what was normalized, and c."""
    return layer.G + layer.cell.states - 1


def _statistics(scale_c: Tensor | None) -> int:
    return 1 if scale_c is None else 3


def _grid(layer: Layer, rows: int) -> tuple[int, int]:
    return -(-rows // layer.tile.rows), layer.D
