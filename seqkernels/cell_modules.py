"""RNNCell, GRUCell and LSTMCell as drop-in modules, which are one step: torch.nn's arguments, parameters, results and
errors."""

from torch import Tensor, nn

from seqkernels import checks, drop_in, functional
from seqkernels.backends.cells import CELLS


class _Cell(nn.RNNCellBase, metaclass=drop_in.DropIn):
    """What the cells share: one step of input ``[B, I]`` or ``[I]`` from states ``[B, H]`` or ``[H]``."""

    backend: str | None = None

    __prepare_scriptable__ = drop_in.fail_on_script
    allow_grad_accumulation = drop_in.fail_on_opacus

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


def inputs_of_step(module: nn.RNNCellBase, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple:
    """Input ``[B, I]``, the weights, and the states ``[B, H]``: those given, or zeros."""
    if input.dim() == 1:
        input = input.unsqueeze(0)
        states = tuple(state.unsqueeze(0) for state in states) if states else None
    if states is None:
        zeros = input.new_zeros(input.shape[0], module.hidden_size)
        states = (zeros,) * CELLS[cell_of(module)].states
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
    return input, drop_in.parameters(module, names), *states


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
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        if self.nonlinearity not in ("tanh", "relu"):
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
        if tracer := drop_in.tracer_of(input, hx):
            return drop_in.traced(tracer, self, input, hx)  # type: ignore[return-value]
        if hx is not None:
            checks.check_pair(hx, "LSTMCell")
        return self._step(input, hx)
