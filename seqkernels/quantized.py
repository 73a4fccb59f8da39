"""Quantized layers and cells, for inference on CPUs: weights of int8, rows of x and h quantized where they are used.

The numbers, in full: a row r of a weight, or of x or h, is max|r| / 127 (its scale, float32) times integers between
-127 and 127, rounded to nearest, ties to even. Products of integers are added up in int32, exactly. Their sums times
both scales, plus biases, are the gates; gates, activations and states are float32. csrc/cpu/quantized.h computes this.

A row whose largest number is below 2^-120 counts as zeros. A row of x or h with an infinity or NaN makes all gates of
its step NaN.

The operator ``quantized_recurrence`` is a stack of layers, as ``recurrence_forward`` -> y, h_n, c_n;
``quantized_all_states`` gives what every layer has at every step, y ``[L, N, D*P]``, h_n, c_n and c ``[L, N, D*H]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkernels import batching, checks, drop_in, modes, onnx_export
from seqkernels._ops import add_op_namespace_prefix, ops
from seqkernels.backends.cells import CELLS
from seqkernels.checks import State
from seqkernels.hardware import THIS_MACHINE
from seqkernels.inputs import Inputs, prepare, restore_layers, restore_layout
from seqkernels.select import BACKENDS, Plan

PACKED = "packed_"  # a buffer, before the name of its weight
SMALLEST = 2.0**-120  # 127 / SMALLEST is finite
# How csrc/cpu/isa.cpp multiplies int8 on a CPU.
_PRODUCTS = {"amx": "AMX", "avx512_bf16": "AVX512-VNNI", "avx512_vnni": "AVX512-VNNI"}
PLAN = Plan(
    "cpu",
    "kernels for weights of int8",
    tuple((backend, "it has no kernel for weights of int8") for backend in BACKENDS if backend != "cpu"),
    f"products of int8 by {_PRODUCTS.get(THIS_MACHINE.isa, f'pairs of int16 ({THIS_MACHINE.isa})')}",
)
# Packed weights (csrc/cpu/packed_int8.h): units of a panel, columns of a whole tile, what is added to numbers of x.
_PANEL, _TILE, _OFFSET = 16, 64, 128


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[rows, n]`` float32 -> int8 ``[rows, n]`` and the scales ``[rows]``; NaN for those of rows not finite."""
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    finite = largest.isfinite()
    zero = ~finite | (largest < SMALLEST)
    factor = (127 / largest).masked_fill(zero, 0)
    integers = (x.masked_fill(~finite.unsqueeze(1), 0) * factor.unsqueeze(1)).round().to(torch.int8)
    return integers, (largest / 127).masked_fill(zero, 0).masked_fill(~finite, torch.nan)


def pack(weight: Tensor, scale: Tensor, bias: Tensor | None, gates: int) -> Tensor:
    """int8 ``[gates*U, n]``, scales and biases ``[gates*U]`` float32 -> as csrc/cpu/packed_int8.h has them."""
    units, n = weight.shape[0] // gates, weight.shape[1]
    panels, columns = -(-units // _PANEL), -(-n // _TILE) * _TILE

    def padded(x: Tensor) -> Tensor:  # [gates, U, *] -> [gates, panels * 16, *]
        return torch.cat([x, x.new_zeros(gates, panels * _PANEL - units, *x.shape[2:])], 1)

    def row(values: Tensor) -> Tensor:  # [gates*U] of four bytes -> [panels, 1, gates * 64] bytes
        of_panels = padded(values.view(gates, units)).view(gates, panels, _PANEL).transpose(0, 1)
        return of_panels.reshape(panels, 1, gates * _PANEL).view(torch.int8)

    correction = (weight.int().sum(1) * -_OFFSET).int()
    head = [row(correction), row(scale), row(torch.zeros_like(scale) if bias is None else bias)]
    wide = torch.cat([weight, weight.new_zeros(len(weight), columns - n)], 1).view(gates, units, columns)
    fours = padded(wide).view(gates, panels, _PANEL, columns // 4, 4).permute(1, 3, 0, 2, 4)
    return torch.cat([*head, fours.reshape(panels, columns // 4, gates * _PANEL * 4)], 1)


def unpack(packed: Tensor, gates: int, units: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """What was packed: the weight, scales and biases (zeros if there were none)."""
    panels = packed.shape[0]

    def of_row(index: int) -> Tensor:
        values = packed[:, index].contiguous().view(torch.float32).view(panels, gates, _PANEL)
        return values.transpose(0, 1).reshape(gates, panels * _PANEL)[:, :units].reshape(gates * units)

    fours = packed[:, 3:].reshape(panels, packed.shape[1] - 3, gates, _PANEL, 4)
    wide = fours.permute(2, 0, 3, 1, 4).reshape(gates, panels * _PANEL, -1)
    return wide[:, :units, :n].reshape(gates * units, n), of_row(1), of_row(2)


class Quantized(nn.Module):
    """What the quantized layers and cells share: their packed weights, which are their buffers, and the call.

    A state dict has them unpacked: int8 ``weight_ih_l0`` and the others in torch.nn's shapes, their scales ``[G*H]`` as
    ``weight_ih_l0_scale``, and the biases. One of a float layer is quantized where it is loaded.
    """

    # What the float layer had, which stays an attribute.
    input_size: int
    hidden_size: int
    bias: bool
    # Set by `quantize`.
    cell: str  # of `backends.cells.CELLS`
    names: list[list[str]]  # for each layer and direction, of its weights and biases
    num_layers = 1
    proj_size = 0
    bidirectional = batch_first = return_all_states = False

    __prepare_scriptable__ = drop_in.fail_on_script

    def _get_name(self) -> str:
        return f"Quantized{CELLS[self.cell].display_name}"

    def _shapes(self) -> list[tuple[str, str | None, int, int, int]]:
        """Of each matrix its name, that of its bias, and gates, units and columns."""
        gates, hidden, directions = CELLS[self.cell].gates, self.hidden_size, 2 if self.bidirectional else 1
        projected = self.proj_size or hidden
        shapes: list[tuple[str, str | None, int, int, int]] = []
        for k, (ih, hh, *rest) in enumerate(self.names):
            columns = self.input_size if k < directions else directions * projected
            b_ih, b_hh = rest[:2] if self.bias else (None, None)
            shapes += [(ih, b_ih, gates, hidden, columns), (hh, b_hh, gates, hidden, projected)]
            if self.proj_size:
                shapes.append((rest[-1], None, 1, self.proj_size, hidden))
        return shapes

    def _run(
        self, inputs: Inputs, all_states: bool = False
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, State]:
        (rows_of, h_0, c_0, *_), packed = inputs, list(self._buffers.values())
        args = self.cell, rows_of.data, packed, h_0, c_0, rows_of.batch_sizes, self.num_layers
        if not all_states:
            return restore_layout(inputs, *ops.quantized_recurrence(*args))
        y, h_n, c_n, c = ops.quantized_all_states(*args)
        h = restore_layers(inputs, y)
        states = h if c_0 is None else (h, restore_layers(inputs, c))
        return *restore_layout(inputs, y[-1], h_n, c_n), states

    def _prepared(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        batch_first: bool = False,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: State | None = None,
    ) -> Inputs:
        """A call's arguments, checked, in the layout of the operators."""
        checks.check_kind_of_input(self._get_name(), input)
        data = input.data if isinstance(input, PackedSequence) else input
        if self.training:
            raise RuntimeError(f"{self._get_name()} is for inference: call eval() of the model")
        if data.device.type != "cpu":
            raise RuntimeError(f"{self._get_name()} runs on the CPU: its input is on {data.device}")
        if data.dtype != torch.float32:
            raise ValueError(f"{self._get_name()} takes float32 and quantizes by itself, got {data.dtype}")
        if onnx_export.exporting():
            raise ValueError("ONNX has no operator of quantized layers: export the model before quantize_")
        gates, projected = CELLS[self.cell].gates, self.proj_size or self.hidden_size
        directions = 2 if self.bidirectional else 1
        # What `prepare` checks of weights are shapes, dtypes and devices: one number is enough.
        one, rows = torch.empty(1, dtype=data.dtype, device="cpu"), gates * self.hidden_size
        weights = [one.expand(rows, self.input_size), one.expand(rows, projected)]
        weights += [one] * (sum(map(len, self.names)) - 2)
        ragged = lengths, None, None, reset, reset_to
        inputs = prepare(self.cell, input, hx, weights, self.num_layers, directions, batch_first, *ragged, self.bias)
        if inputs.save or modes.forward_mode(inputs.rows.data, inputs.h_0, inputs.c_0):
            raise RuntimeError(f"{self._get_name()} has no gradients: call it under torch.no_grad()")
        return inputs

    def step(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One step of a stream through all layers, as that of the layer in floating point; its bits are those of the
        same sequence in one call.

        Raises:
            ValueError: the layer is bidirectional; an input of other dimensions.
            TypeError: the input is no tensor.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no step: its second direction begins at the end of a stream")
        checks.check_input_of_step(input)
        y, state = self._run(self._prepared(input.unsqueeze(0), state))  # type: ignore[misc]
        return y.squeeze(0), state  # type: ignore[union-attr]

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, bias, *sizes in self._shapes():
            weight, scale, bias_values = unpack(getattr(self, PACKED + name), *sizes)
            destination[prefix + name], destination[f"{prefix}{name}_scale"] = weight, scale
            if bias:
                destination[prefix + bias] = bias_values

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        expected = set()
        for name, bias, gates, units, n in self._shapes():
            weight = state_dict.get(prefix + name)
            keys = {name: (gates * units, n)} | ({bias: (gates * units,)} if bias else {})
            if weight is not None and not weight.is_floating_point():
                keys[f"{name}_scale"] = (gates * units,)
            expected |= {prefix + key for key in keys}
            missing = [key for key in keys if prefix + key not in state_dict]
            wrong = [key for key in keys if key not in missing and state_dict[prefix + key].shape != keys[key]]
            missing_keys += [prefix + key for key in missing]
            error_msgs += [
                f"size mismatch for {prefix}{key}: {list(keys[key])} in the model, "
                f"{list(state_dict[prefix + key].shape)} in the state dict"
                for key in wrong
            ]
            if missing or wrong:
                continue
            with torch.no_grad():
                if weight.is_floating_point():
                    weight, scale = quantize_rows(weight.float())
                else:
                    scale = state_dict[f"{prefix}{name}_scale"]
                bias_values = state_dict[prefix + bias] if bias else None
                getattr(self, PACKED + name).copy_(pack(weight, scale, bias_values, gates))
        here = [key for key in state_dict if key.startswith(prefix) and "." not in key[len(prefix) :]]
        unexpected_keys += [key for key in here if strict and key not in expected]


class QuantizedLayer(Quantized):
    """What `quantize_` makes of a layer: the same calls, for inference on CPUs."""

    def extra_repr(self) -> str:
        all_states = ", return_all_states=True" if self.return_all_states else ""
        return nn.RNNBase.extra_repr(self) + all_states  # type: ignore[arg-type]

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | PackedSequence | None = None,
        reset_to: State | None = None,
        return_all_states: bool | None = None,
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, State]:
        """As that of the layer in floating point, in float32. What resets have cut runs side by side. All states have
        the bits of steps.

        Raises:
            RuntimeError: gradients are wanted, the layer is in training mode, or the input on another device.
            ValueError: the input is not float32; ONNX, which has no such operator.
            ValueError, RuntimeError, TypeError: torch.nn's own for what does not fit.
        """
        if tracer := drop_in.tracer_of(input, hx, lengths, reset, reset_to):
            options = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "return_all_states": return_all_states}
            return drop_in.traced(tracer, self, input, hx, **options)  # type: ignore[return-value]
        all_states = self.return_all_states if return_all_states is None else return_all_states
        checks.check_flag("return_all_states", all_states)
        return self._run(self._prepared(input, hx, self.batch_first, lengths, reset, reset_to), all_states)


class QuantizedCell(Quantized):
    """What `quantize_` makes of an RNNCell, GRUCell or LSTMCell."""

    def _get_name(self) -> str:
        return f"{super()._get_name()}Cell"

    def extra_repr(self) -> str:
        return nn.RNNCellBase.extra_repr(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """As that of the cell in floating point; errors as those of `QuantizedLayer`."""
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        _, new = self.step(input, _of_one_layer(hx))
        return new.squeeze(0) if isinstance(new, Tensor) else (new[0].squeeze(0), new[1].squeeze(0))


def _of_one_layer(hx: State | None) -> State | None:
    if hx is None or isinstance(hx, Tensor):
        return None if hx is None else hx.unsqueeze(0)
    return hx[0].unsqueeze(0), hx[1].unsqueeze(0)


def plan_of(
    module: Quantized,
    input: Tensor | PackedSequence,
    hx: State | None = None,
    *,
    return_all_states: bool | None = None,
    **of_rows,
) -> Plan:
    """What a call would run; its arguments are checked as there."""
    if isinstance(module, QuantizedLayer):
        if return_all_states is not None:
            checks.check_flag("return_all_states", return_all_states)
        module._prepared(input, hx, module.batch_first, **of_rows)
    else:
        checks.check_input_of_step(input)
        module._prepared(input.unsqueeze(0), _of_one_layer(hx))  # type: ignore[union-attr]
    return PLAN


def quantize(module: nn.Module, cell: str, names: list[list[str]], weights: dict[str, Tensor]) -> None:
    """Make a layer or cell of ours a quantized one, in place; names: of its weights, for each layer and direction."""
    module.__dict__.pop("_assigned_weights", None)
    for name in list(module._parameters):
        del module._parameters[name]
    module.__class__ = QuantizedLayer if isinstance(module, drop_in.Layer) else QuantizedCell
    assert isinstance(module, Quantized)
    module.names, module.cell = names, cell
    for name, bias, gates, _, _ in module._shapes():
        with torch.no_grad():
            packed = pack(*quantize_rows(weights[name].detach()), weights[bias].detach() if bias else None, gates)
        module.register_buffer(PACKED + name, packed, persistent=False)
    module.eval()


def _fake(cell, x, weights, h_0, c_0, batch_sizes, layers=1):
    columns = h_0.shape[0] // layers * h_0.shape[2]
    c_n = h_0.new_empty(*h_0.shape[:2], 0 if c_0 is None else c_0.shape[2])
    return x.new_empty(x.shape[0], columns), torch.empty_like(h_0, memory_format=torch.contiguous_format), c_n


def _fake_all_states(cell, x, weights, h_0, c_0, batch_sizes, layers=1):
    y, h_n, c_n = _fake(cell, x, weights, h_0, c_0, batch_sizes, layers)
    columns = h_0.shape[0] // layers * c_n.shape[2]
    return x.new_empty(layers, *y.shape), h_n, c_n, x.new_empty(layers, x.shape[0], columns)


_library = torch.library.Library(ops.name, "FRAGMENT")
if not THIS_MACHINE.native_missing:  # csrc/cpu/ops.cpp defines the operators
    for _name, _of in (("quantized_recurrence", _fake), ("quantized_all_states", _fake_all_states)):
        torch.library.register_fake(add_op_namespace_prefix(_name), _of, lib=_library)
        batching.register(_name, batching.Members(getattr(ops, _name).default, None), _library)
