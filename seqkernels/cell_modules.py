"""RNNCell, GRUCell and LSTMCell as drop-in modules, which are one step: torch.nn's arguments, parameters, results and
errors."""

from collections.abc import Sequence

from torch import Tensor, nn

from seqkernels import checks, drop_in, functional, kept_weights, plain_calls
from seqkernels.backends.cells import CELLS


class _Cell(nn.RNNCellBase, metaclass=drop_in.DropIn):
    """What the cells share: one step of input ``[B, I]`` or ``[I]`` from states ``[B, H]`` or ``[H]``."""

    backend: str | None = None
    keep_packed = True  # as of layers

    __prepare_scriptable__ = drop_in.fail_on_script
    allow_grad_accumulation = drop_in.fail_on_opacus

    def _apply(self, fn, recurse: bool = True):
        kept_weights.release(self)
        return super()._apply(fn, recurse)

    def _short_step(self, cell: str, input: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """h, or (h, c), by the short way; None: it has to go the long way."""
        return plain_calls.run_cell(self, cell, names_of_weights(self), input, states)

    def _step(self, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """(h, c) of one step, after torch.nn's checks with torch.nn's messages."""
        for tensor in (input, *(states or ())):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{self._get_name()} takes Tensors, got a {type(tensor).__name__}")
        dimensions = input.dim()
        if dimensions not in (1, 2):
            raise ValueError(f"{self._get_name()}: Expected input to be 1D or 2D, got {dimensions}D instead")
        for k, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                what = f"hx[{k}]" if CELLS[cell_of(self)].states == 2 else "hidden"
                raise ValueError(f"{self._get_name()}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
        x, weights, *given = inputs_of_step(self, input, states)
        h, c = functional.recurrent_cell(cell_of(self), x, *given, weights=weights, backend=self.backend)
        return (h.squeeze(0), c.squeeze(0)) if dimensions == 1 else (h, c)


def cell_of(module: nn.RNNBase | nn.RNNCellBase) -> str:
    """The name, in `backends.cells.CELLS`, of what a layer or cell computes, torch.nn's or ours."""
    if isinstance(module, nn.RNNBase):
        return module.mode.lower()
    if isinstance(module, (nn.RNNCell, RNNCell)):
        return f"rnn_{module.nonlinearity}"
    return "gru" if isinstance(module, (nn.GRUCell, GRUCell)) else "lstm"


def names_of_weights(module: nn.RNNCellBase) -> Sequence[str]:
    names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
    return names if module.bias else names[:2]


def inputs_of_step(module: nn.RNNCellBase, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple:
    """Input ``[B, I]``, the weights, and the states ``[B, H]``: those given, or zeros."""
    if input.dim() == 1:
        input = input.unsqueeze(0)
        states = tuple(state.unsqueeze(0) for state in states) if states else None
    if states is None:
        zeros = input.new_zeros(input.shape[0], module.hidden_size)
        states = (zeros,) * CELLS[cell_of(module)].states
    return input, drop_in.parameters(module, names_of_weights(module)), *states


class RNNCell(_Cell):
    """One step of an Elman RNN, a drop-in for `torch.nn.RNNCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``, zeros if None) -> h' like hx; float64, float32,
    bfloat16 or float16. What does not fit raises torch.nn.RNNCell's ValueError or RuntimeError.
    """

    __constants__ = nn.RNNCell.__constants__

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        known = self.nonlinearity in ("tanh", "relu")
        if known and (found := self._short_step(f"rnn_{self.nonlinearity}", input, () if hx is None else (hx,))):
            return found[0]
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        if not known:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(input, None if hx is None else (hx,))[0]


class GRUCell(_Cell):
    """One step of a GRU, a drop-in for `torch.nn.GRUCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``, zeros if None) -> h' like hx; float64, float32,
    bfloat16 or float16. What does not fit raises torch.nn.GRUCell's ValueError or RuntimeError.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if found := self._short_step("gru", input, () if hx is None else (hx,)):
            return found[0]
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        return self._step(input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    """One step of an LSTM, a drop-in for `torch.nn.LSTMCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx = (h, c) of ``[B, H]`` or ``[H]`` each, zeros if None) -> (h', c'); float64,
    float32, bfloat16 or float16. What does not fit raises torch.nn.LSTMCell's ValueError or RuntimeError.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2
        if (pair or hx is None) and (found := self._short_step("lstm", input, hx or ())):
            return found[0], found[1]
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        if hx is not None:
            checks.check_pair(hx, "LSTMCell")
        return self._step(input, hx)
