"""RNN, GRU, LSTM and their cells as drop-in modules: torch.nn's arguments, parameters, results and errors.

They derive from nn.RNNBase and not from nn.GRU itself, because torch.compile refuses every instance of nn.RNN, nn.GRU
and nn.LSTM. Parameters are read by name in every call: there is no flat weight buffer and no cached copy to go stale,
so parametrizations, weight tying, functional_call, deepcopy, pickle and plain assignment all just work.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from seqkernels import functional, hardware, ops, select
from seqkernels.functional import State


class _Drop(type):
    """The class of our classes. Inside `patch_torch`, where torch.nn.GRU is ours, `isinstance` of it is true of
    torch.nn's own modules as well, as there code that asks for nn.GRU means either."""

    counting: ClassVar[dict[type, type]] = {}  # ours -> the torch.nn class whose instances count as its own

    def __instancecheck__(cls, instance) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, _Drop.counting.get(cls, ()))


@contextlib.contextmanager
def counting_as(torchs: dict[type, type]) -> Iterator[None]:
    """Inside, instances of torch.nn's classes count as instances of ours."""
    before, _Drop.counting = _Drop.counting, torchs
    try:
        yield
    finally:
        _Drop.counting = before


def _parameters(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    # A parametrized weight is no parameter but an attribute; nn.Module's own lookup would take twice the time.
    parameters = module._parameters
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


class _FlatWeights(list):
    """A layer's weights in torch.nn's order. One put in place of another is used from then on, as in torch.nn."""

    def __init__(self, module: "_Recurrent", weights: Sequence[Tensor]) -> None:
        super().__init__(weights)
        self._module = module

    def __setitem__(self, index, value) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = self

    def __reduce__(self):
        return list, (list(self),)


def _traced(module: nn.Module, input: fx.Proxy, hx, **options) -> fx.Proxy:
    """A call of `module` in a graph that torch.fx traces, where torch.nn's modules are leaves and ours become one."""
    args = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in options.items() if value is not None}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), args, given)


class _Recurrent(nn.RNNBase, metaclass=_Drop):
    """What RNN, GRU and LSTM share.

    Attributes:
        backend: forces a backend for this module (see `seqkernels.select.BACKENDS`); None lets `select` choose.
    """

    backend: str | None = None

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, State]:
        """torch.nn's forward, and `lengths` ``[B]`` instead of packing; see `seqkernels.functional.gru`."""
        if isinstance(input, fx.Proxy):
            return _traced(self, input, hx, lengths=lengths)
        return functional.recurrent(
            self.mode.lower(),
            input,
            hx,
            self._weights(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            lengths=lengths,
            backend=self.backend,
        )

    def flatten_parameters(self) -> None:
        """Does nothing: parameters are used where they lie."""

    # nn.RNNBase keeps a second list of its parameters up to date in the methods below. Here they are looked up
    # whenever they are asked for, and only what somebody has put into that list in place of one is kept, by its name.

    def _weights(self) -> list[Tensor]:
        assigned = self.__dict__.get("_assigned_weights")
        if not assigned:
            return _parameters(self, self._flat_weights_names)
        return [assigned[n] if n in assigned else _parameters(self, (n,))[0] for n in self._flat_weights_names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return _FlatWeights(self, self._weights())

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor]) -> None:
        names = self._flat_weights_names
        if len(weights) != len(names):
            raise ValueError(f"_flat_weights are {', '.join(names)}, got {len(weights)} weights")
        self.__dict__["_assigned_weights"] = {
            name: weight for name, weight in zip(names, weights, strict=True) if weight is not getattr(self, name, None)
        }

    def _init_flat_weights(self) -> None:
        self.__dict__.pop("_assigned_weights", None)

    def _update_flat_weights(self) -> None:
        pass

    def _weights_have_changed(self) -> bool:
        return False

    def __setattr__(self, name: str, value) -> None:
        if name == "_flat_weights":  # nn.Module's own does not ask properties where the value is no parameter
            return object.__setattr__(self, name, value)
        if "_assigned_weights" in self.__dict__ and name in self._flat_weights_names:
            self._init_flat_weights()  # a new parameter counts, and in torch.nn puts the others back as well
        nn.Module.__setattr__(self, name, value)

    def _apply(self, fn, recurse: bool = True):
        self._init_flat_weights()
        return nn.Module._apply(self, fn, recurse)

    def _replicate_for_data_parallel(self):
        replica = nn.Module._replicate_for_data_parallel(self)
        if assigned := self.__dict__.get("_assigned_weights"):
            replica.__dict__["_assigned_weights"] = assigned.copy()
        return replica

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_flat_weight_refs", None)  # torch.nn's, which nobody can pickle
        return state

    def __setstate__(self, state: dict) -> None:
        nn.Module.__setstate__(self, state)


class RNN(_Recurrent):
    """Elman RNN with tanh or relu, a drop-in for `torch.nn.RNN`: h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Takes torch.nn.RNN's arguments (input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
    bidirectional, device, dtype), has the same parameters, and raises the same errors. Input, state and result are
    described at `seqkernels.functional.gru`. Source of the formula: the torch.nn.RNN documentation.
    """

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__("RNN_" + nonlinearity.upper(), *args, **kwargs)


class GRU(_Recurrent):
    """Gated recurrent unit, a drop-in for `torch.nn.GRU`, with its reset gate applied after the matrix product.

    Takes torch.nn.GRU's arguments (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
    device, dtype), has the same parameters, and raises the same errors. Input, state and result are described at
    `seqkernels.functional.gru`. Source of the formula: the torch.nn.GRU documentation.
    """

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """Long short-term memory, a drop-in for `torch.nn.LSTM`, with its optional projection of h to proj_size.

    Takes torch.nn.LSTM's arguments (those of GRU, and proj_size), has the same parameters, and raises the same errors.
    State and result hold (h, c). Source of the formula: the torch.nn.LSTM documentation.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # What torch.nn.LSTM has for its two states.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden


class _Cell(nn.RNNCellBase, metaclass=_Drop):
    """What the cells share: one step of input ``[B, I]`` or ``[I]`` from states ``[B, H]`` or ``[H]``."""

    backend: str | None = None

    def _step(self, cell: str, input: Tensor, states: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """(h, c) of one step, after torch.nn's checks with torch.nn's messages."""
        dimensions = input.dim()
        if dimensions not in (1, 2):
            raise ValueError(f"{self._get_name()}: Expected input to be 1D or 2D, got {dimensions}D instead")
        for k, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                what = f"hx[{k}]" if cell == "lstm" else "hidden"
                raise ValueError(f"{self._get_name()}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
        unbatched = dimensions == 1
        if unbatched:
            input = input.unsqueeze(0)
            states = tuple(state.unsqueeze(0) for state in states) if states else None
        if states is None:
            zeros = input.new_zeros(input.shape[0], self.hidden_size)
            states = (zeros, zeros) if cell == "lstm" else (zeros,)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        weights = _parameters(self, names)
        h, c = functional.recurrent_cell(cell, input, *states, weights=weights, backend=self.backend)
        return (h.squeeze(0), c.squeeze(0)) if unbatched else (h, c)


class RNNCell(_Cell):
    """One step of an Elman RNN, a drop-in for `torch.nn.RNNCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``, zeros if None) -> h' like hx.
    """

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
        if isinstance(input, fx.Proxy):
            return _traced(self, input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step("rnn_" + self.nonlinearity, input, None if hx is None else (hx,))[0]


class GRUCell(_Cell):
    """One step of a GRU, a drop-in for `torch.nn.GRUCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``, zeros if None) -> h' like hx.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if isinstance(input, fx.Proxy):
            return _traced(self, input, hx)
        return self._step("gru", input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    """One step of an LSTM, a drop-in for `torch.nn.LSTMCell` (source of the formula: its documentation).

    forward(input ``[B, I]`` or ``[I]``, hx = (h, c) of ``[B, H]`` or ``[H]`` each, zeros if None) -> (h', c').
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(input, fx.Proxy):
            return _traced(self, input, hx)
        return self._step("lstm", input, hx)


def cell_of(module: nn.Module) -> str | None:
    """The cell of a layer or of one step of it, ours or torch.nn's; None of other modules."""
    if isinstance(module, nn.RNNBase):
        return module.mode.lower()
    if isinstance(module, (nn.RNNCell, RNNCell)):
        return "rnn_" + module.nonlinearity
    if isinstance(module, (nn.GRUCell, GRUCell)):
        return "gru"
    return "lstm" if isinstance(module, (nn.LSTMCell, LSTMCell)) else None


def unsupported(module: nn.Module) -> str | None:
    """Why no backend that may be chosen here runs the drop-in of a module of torch.nn; None if one does."""
    weight = next(module.parameters())
    try:
        select.plan(
            select.Call(cell_of(module), weight.device.type, weight.dtype), hardware.machine_of(weight.device)
        )
    except ValueError as error:
        return str(error)
    return None


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: State | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
) -> select.Plan:
    """Which backend, and which of its kernels, would run `module` on `input`, and why not the others; nothing is run.

    Args:
        module: one of our modules or cells, or one of torch.nn's, for which the answer is that of its drop-in.
        input, hx, lengths: what the module would be called with.

    Raises:
        TypeError: a module that is no RNN, GRU, LSTM or cell.
        ValueError: as the module itself, where the backend that is forced cannot run.
    """
    cell, layers = cell_of(module), None
    if cell is None:
        raise TypeError(f"explain takes an RNN, GRU, LSTM or one of their cells, got {type(module).__name__}")
    if isinstance(module, nn.RNNBase):
        weights, layers = module._flat_weights, (module.num_layers, 2 if module.bidirectional else 1)
    else:
        weights = [module.weight_ih, module.weight_hh]
    batch_sizes = None
    if isinstance(input, PackedSequence):
        rows, batch_sizes, sequences = input.data, input.batch_sizes, int(input.batch_sizes[0])
    else:
        rows, batched = input.reshape(-1, input.shape[-1]), input.dim() == (2 if layers is None else 3)
        sequences = input.shape[0 if layers is None or module.batch_first else 1] if batched else 1
    if lengths is not None:
        steps = rows.shape[0] // max(sequences, 1)
        where = lengths.device if isinstance(lengths, Tensor) else "cpu"
        batch_sizes = torch.full((steps,), sequences, device=where)
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
    backend = getattr(module, "backend", None)
    transformed = ops.transformed()
    return functional.plan_of(cell, rows, weights, states, sequences, batch_sizes, layers, transformed, backend)
