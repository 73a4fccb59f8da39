"""RNN, GRU and LSTM as drop-in modules: torch.nn's arguments, parameters, results and errors; and LiGRU. Their cells
stand in `cell_modules`.

They derive from nn.RNNBase and not from nn.GRU itself, because torch.compile refuses every instance of nn.RNN, nn.GRU
and nn.LSTM. Parameters are read by name in every call: there is no flat weight buffer, and no copy that could go stale
(`kept_weights` has one that is compared with them), so parametrizations, weight tying, functional_call, deepcopy,
pickle and plain assignment all just work.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqkernels import checks, drop_in, functional, plain_calls, states, streaming
from seqkernels.backends.cells import CELLS
from seqkernels.cell_modules import GRUCell, LSTMCell, RNNCell, cell_of
from seqkernels.cell_options import CellOptions
from seqkernels.functional import State

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LiGRU", "RNNCell", "is_recurrent"]


class _Recurrent(drop_in.Layer):
    """What RNN, GRU and LSTM share.

    Keyword arguments beside those of torch.nn:
        return_all_states: a call returns the states of every layer at every step as well (docs/states.md).
        learn_initial_state: a call without a state begins with parameters of the layer, initial_h ``[L*D, H]`` and of
            LSTM initial_c, zeros at first; a state dict without them loads all the same.
        recompute: the backward pass runs each layer again, of which nothing but its input is saved: the same bits in
            less memory and more time (docs/memory.md).
        zoneout, recurrent_dropout, candidate_dropout, input_dropout, weight_dropout, layer_norm, blocks: what
            `seqkernels.CellOptions` says of them (docs/cells.md). Layer norm has parameters beside torch.nn's, without
            which a state dict loads all the same; with blocks, weight_hh_l0 and its like are ``[G*H, H/blocks]``.

    Attributes:
        cell_options: the seven above as one `seqkernels.CellOptions`, None where all are off. Another with the same
            layer_norm and blocks may take its place at any time.
        backend: forces a backend for this module (see `seqkernels.select.BACKENDS`); None lets `select` choose.
        keep_packed: whether packed weights may stay between calls on a CPU (docs/backends.md).
    """

    backend: str | None = None
    keep_packed = True
    return_all_states = learn_initial_state = recompute = False
    cell_options: CellOptions | None = None
    _norm_names: tuple[str, ...] = ()
    _forward_of_torch: ClassVar[Callable | None] = None  # where torch.nn has such a layer

    def __init__(
        self,
        *args,
        return_all_states: bool = False,
        learn_initial_state: bool = False,
        recompute: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        candidate_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        layer_norm: bool | str = False,
        blocks: int = 1,
        **kwargs,
    ) -> None:
        checks.check_flag("return_all_states", return_all_states)
        checks.check_flag("learn_initial_state", learn_initial_state)
        checks.check_flag("recompute", recompute)
        dropouts = recurrent_dropout, candidate_dropout, input_dropout, weight_dropout
        options = CellOptions(zoneout, *dropouts, layer_norm, blocks)
        super().__init__(*args, **kwargs)
        # Only what differs from the class is kept.
        if recompute:
            self.recompute = True
        if return_all_states:
            self.return_all_states = True
        if learn_initial_state:
            self.learn_initial_state = True
            weight = next(self.parameters())
            states.learn_initial(self, weight.dtype, weight.device)
        if options.given():
            self._take_options(options)

    def _take_options(self, options: CellOptions) -> None:
        """Check options, and make the parameters they have."""
        cell, hidden_size = cell_of(self), self.hidden_size
        sizes = options.norm_sizes(cell, hidden_size, self.bias, bool(self.proj_size))
        self.cell_options, suffixes = options, ("", "_reverse")[: 1 + self.bidirectional]
        places = [f"_l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]
        for place in places if options.blocks > 1 else ():
            w_hh = getattr(self, f"weight_hh{place}")
            shape = CELLS[cell].gates * hidden_size, hidden_size // options.blocks
            setattr(self, f"weight_hh{place}", nn.Parameter(w_hh.new_empty(shape)))
        like = next(self.parameters())
        for name, size in ((name + place, size) for place in places for name, size in sizes.items()):
            self.register_parameter(name, nn.Parameter(like.new_empty(size)))
        self._norm_names = tuple(name + place for place in places for name in sizes)
        states.keep_own_parameters(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for _, parameter in states.initial_parameters(self):
            nn.init.zeros_(parameter)
        for name in self._norm_names:
            nn.init.constant_(getattr(self, name), 0.0 if name.startswith("shift") else 1.0)

    def extra_repr(self) -> str:
        options = "return_all_states", "learn_initial_state", "recompute"
        mine: dict[str, object] = {name: True for name in options if getattr(self, name)}
        mine |= self.cell_options.given() if self.cell_options else {}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in mine.items())])

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
        """torch.nn's forward, `lengths` ``[B]`` instead of packing, and resets; see `seqkernels.functional.gru`.

        Before each step that the mask `reset` marks (``[T, B]``, with batch_first ``[B, T]``) the state is `reset_to`,
        one as hx; None for what a call without hx begins with: zeros, or the learned initial state (docs/resets.md).
        With return_all_states (None: as the layer was made) a third result: the states of every layer at every step
        (docs/states.md).
        """
        plain = lengths is None and reset is None and reset_to is None and not return_all_states
        if plain and (results := plain_calls.run(self, input, hx)):
            return results
        if tracer := drop_in.tracer_of(input, hx, lengths, reset, reset_to):
            options = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "return_all_states": return_all_states}
            return drop_in.traced(tracer, self, input, hx, **options)  # type: ignore[return-value]
        all_states = self.return_all_states if return_all_states is None else return_all_states
        checks.check_flag("return_all_states", all_states)
        weights = self._weights()
        if checks.any_expanded(weights):
            beyond_torch = lengths is not None or reset is not None or all_states or self.learn_initial_state
            beyond_torch = beyond_torch or self.cell_options is not None
            if self._forward_of_torch and not beyond_torch:
                return self._forward_of_torch(input, hx)  # call_for_per_sample_grads has rules for torch's operations
            checks.check_kind(weights)
        begins_anew = reset is not None and reset_to is None
        if self.learn_initial_state and (hx is None or begins_anew):
            learned = states.initial(self, input)
            hx, reset_to = learned if hx is None else hx, learned if begins_anew else reset_to
        run = states.recurrent if all_states else functools.partial(functional.recurrent, kept_by=self)
        return run(
            self.mode.lower(),
            input,
            hx,
            weights,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            lengths=lengths,
            reset=reset,
            reset_to=reset_to,
            recompute=self.recompute,
            cell_options=self.cell_options,
            norms=self._norms(),
            backend=self.backend,
        )

    def _norms(self) -> Sequence[Tensor]:
        return drop_in.parameters(self, self._norm_names) if self._norm_names else ()

    def step(
        self,
        input: Tensor,
        state: State | None = None,
        *,
        out: tuple[Tensor, State] | None = None,
    ) -> tuple[Tensor, State]:
        """One step of a stream through all layers.

        In float32 and float64 on the CPU's kernels, steps have the bits of the same sequence in one call. Hooks of the
        module do not run.

        Args:
            input: ``[B, I]``, or ``[I]`` of one sequence, whatever batch_first says.
            state: as hx of a call: ``[L, B, H]`` (``[L, H]`` of one sequence), of LSTM (h, c); None for the first step.
            out: (y, state) that the results are written to, tensors like the results; the given state may be among
                them. Not with gradients.

        Returns:
            y ``[B, H]`` (``[H]``) of the last layer, and the state for the next step.

        Raises:
            ValueError: the module is bidirectional; an input of other dimensions; in training, a dropout that has one
                mask for all steps of a sequence.
            RuntimeError: torch.nn's own for sizes that do not fit; an `out` that does not fit, or with gradients.
        """
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no step: its second direction begins at the end of a stream")
        if results := plain_calls.run(self, input, state, one_step=True):
            return results if out is None else streaming.write(out, *results)
        if self.learn_initial_state and state is None:
            state = states.initial(self, input, batched=2)
        y, new = streaming.step(
            self.mode.lower(),
            input,
            state,
            self._weights(),
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            recompute=self.recompute,
            cell_options=self.cell_options,
            norms=self._norms(),
            backend=self.backend,
            kept_by=self,
        )
        return (y, new) if out is None else streaming.write(out, y, new)


class RNN(_Recurrent):
    """Elman RNN with tanh or relu, a drop-in for `torch.nn.RNN`: h' = tanh(W_ih x + b_ih + W_hh h + b_hh).

    Takes torch.nn.RNN's arguments (input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout,
    bidirectional, device, dtype), has the same parameters, and raises the same errors. Input, state and result are
    described at `seqkernels.functional.gru`. Source of the formula: the torch.nn.RNN documentation.
    """

    _forward_of_torch = nn.RNN.forward

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

    _forward_of_torch = nn.GRU.forward

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class LSTM(_Recurrent):
    """Long short-term memory, a drop-in for `torch.nn.LSTM`, with its optional projection of h to proj_size.

    Takes torch.nn.LSTM's arguments (those of GRU, and proj_size), has the same parameters, and raises the same errors.
    Input and result are described at `seqkernels.functional.gru`, the states (h, c) at `seqkernels.functional.lstm`.
    Source of the formula: the torch.nn.LSTM documentation.
    """

    _forward_of_torch = nn.LSTM.forward

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # What torch.nn.LSTM has for its two states.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class LiGRU(_Recurrent):
    """Light gated recurrent unit: no reset gate, and relu in place of tanh; torch.nn has none.

        a = relu(W_ia x + b_ia + W_ha h + b_ha)
        z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        h' = z * h + (1 - z) * a

    Takes the arguments of GRU. weight_ih_l0 ``[2*H, I]`` and the others have the rows of a before those of z, as
    SpeechBrain's LiGRU has them. Two things differ from it: there is no batch normalization, and biases are optional
    and added to both products, as in torch.nn. Input, state and result are described at `seqkernels.functional.gru`.

    Source of the formula: Ravanelli, Brakel, Omologo and Bengio, "Light Gated Recurrent Units for Speech Recognition",
    2018, https://arxiv.org/abs/1803.10225; speechbrain.nnet.RNN.LiGRU.
    """

    def __init__(self, input_size: int, hidden_size: int, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not LiGRU")
        # nn.RNNBase knows no cell of two gates: it checks the arguments and names the parameters, as those of an RNN;
        # then they get their sizes.
        super().__init__("RNN_RELU", input_size, hidden_size, *args, **kwargs)
        self.mode = "LIGRU"
        for name in self._flat_weights_names:
            before = getattr(self, name)
            setattr(self, name, nn.Parameter(before.new_empty(2 * hidden_size, *before.shape[1:])))
        self.reset_parameters()

    def _take_options(self, options: CellOptions) -> None:
        self.mode = "LIGRU"  # whose options they are
        super()._take_options(options)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is an RNN, GRU, LSTM or one of their cells, torch.nn's or ours; or a LiGRU of ours.

    For code that asks `isinstance(module, nn.GRU)`, to initialize say: ours are no instances of torch.nn's classes, as
    torch.compile refuses all of those.
    """
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))
