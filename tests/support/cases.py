"""Configurations of whole modules, and how ours, torch.nn and the specification each run one."""

from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from ligru import LiGRU
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels as sk
from seqkernels import reference
from seqkernels.backends import cells

TORCH_CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # that torch.nn has, and cuDNN
CELLS = tuple(cells.CELLS)
WITH_RELU = ("rnn_relu", "ligru")  # neither bounded nor smooth
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("padded", "unbatched", "packed_sorted", "packed_unsorted", "lengths", "cu_seqlens")


@dataclass(frozen=True)
class Case:
    cell: str
    dtype: torch.dtype = torch.float32
    layout: str = "padded"
    lengths: tuple[int, ...] = (5, 5, 5)  # one for each sequence; all equal where the layout is padded
    input_size: int = 4
    hidden_size: int = 5
    proj_size: int = 0
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    state: bool = True  # an initial state is given
    memory: str = "contiguous"  # of the input: contiguous, strided, expanded (one sequence, repeated)
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(self.lengths)

    @property
    def module_options(self) -> dict:
        options = {
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "dtype": self.dtype,
        }
        if cells.CELLS[self.cell].can_project:
            options["proj_size"] = self.proj_size
        elif self.cell.startswith("rnn"):
            options["nonlinearity"] = self.cell[4:]
        return options

    def module(self, namespace) -> nn.Module:
        """The module of torch.nn or of seqkernels, with weights that depend on the seed alone."""
        torch.manual_seed(self.seed)
        name = cells.CELLS[self.cell].display_name
        if namespace is nn and self.cell not in TORCH_CELLS:
            module = LiGRU(self.input_size, self.hidden_size, **self.module_options)
            module.load_state_dict(self.module(sk).state_dict())
            return module
        return getattr(namespace, name)(self.input_size, self.hidden_size, **self.module_options)

    def data(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Input ``[T, B, I]`` and the initial states, all leaves that require gradients."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device(), self.dtype)

        batch = len(self.lengths)
        if self.memory == "expanded":
            x = random(self.steps, 1, self.input_size).expand(-1, batch, -1)
        elif self.memory == "strided":
            x = random(self.input_size, batch, 2 * self.steps).permute(2, 1, 0)[::2]
        else:
            x = random(self.steps, batch, self.input_size)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        states = [random(rows, batch, self.proj_size or self.hidden_size)]
        if self.cell == "lstm":
            states.append(random(rows, batch, self.hidden_size))
        return x.requires_grad_(), tuple(s.requires_grad_() for s in states)


def on_device(lengths: Sequence[int], backend: str | None) -> Tensor:
    """Lengths, or their sums, where the tests run; cuDNN takes them from the CPU only."""
    return torch.tensor(lengths, device="cpu" if backend == "cudnn" else None)


def _gradients(case: Case, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of all inputs for fixed random gradients of all outputs."""
    generator = torch.Generator("cpu").manual_seed(case.seed + 2)
    random = [torch.randn(o.shape, generator=generator, device="cpu").to(case.dtype) for o in outputs.values()]
    weights = [grad.to(o) for grad, o in zip(random, outputs.values(), strict=True)]
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights, allow_unused=True)
    found = {
        f"grad {name}": torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(inputs.items(), grads, strict=True)
    }
    return outputs | found


def _cut(padded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The sequences of ``[T, B, *]`` one after another."""
    return torch.cat([padded[:length, b] for b, length in enumerate(lengths)])


def _inputs(x: Tensor, states: tuple[Tensor, ...], module: nn.Module, case: Case) -> dict[str, Tensor]:
    named = dict(zip(("h_0", "c_0"), states, strict=False)) if case.state else {}
    return {"x": x} | named | dict(module.named_parameters())


def run_spec(case: Case) -> dict[str, Tensor]:
    module = case.module(nn).double()
    x, states = case.data()
    x, states = x.detach().double().requires_grad_(), tuple(s.detach().double().requires_grad_() for s in states)
    given = states if case.state else tuple(torch.zeros_like(s) for s in states)
    outputs, *final = reference.forward(
        case.cell,
        [x[:length, b] for b, length in enumerate(case.lengths)],
        given[0],
        given[1] if case.cell == "lstm" else None,
        list(module.parameters()),
        bias=case.bias,
        num_layers=case.num_layers,
        bidirectional=case.bidirectional,
    )
    results = {"output": torch.cat(outputs)} | dict(zip(("h_n", "c_n"), final, strict=True))
    results = {name: value for name, value in results.items() if value is not None}
    return _gradients(case, results, _inputs(x, states, module, case))


def run_torch(case: Case) -> dict[str, Tensor]:
    """torch.nn's own module. It knows neither `lengths` nor empty sequences, so it gets the others, packed."""
    module = case.module(nn)
    x, states = case.data()
    some = torch.tensor([b for b, length in enumerate(case.lengths) if length], dtype=torch.long)
    lengths = tuple(case.lengths[b] for b in some)
    hx = tuple(s[:, some] for s in states) if case.state else None
    if case.layout in ("padded", "unbatched"):
        output, final = _call(module, _in_layout(x, case), hx, case)
        output = output.unsqueeze(1) if case.layout == "unbatched" else output
    else:
        packed = pack_padded_sequence(x[:, some], lengths, enforce_sorted=case.layout == "packed_sorted")
        output, final = _call(module, packed, hx, case)
        output = pad_packed_sequence(output)[0]
    if case.layout == "padded" and case.batch_first:
        output = output.transpose(0, 1)
    complete = []
    for value, state in zip(final, states, strict=True):
        before = state if case.state else torch.zeros_like(state)
        value = value.unsqueeze(1) if case.layout == "unbatched" else value
        complete.append(before.index_copy(1, some, value))
    results = {"output": _cut(output, lengths)} | dict(zip(("h_n", "c_n"), complete, strict=False))
    return _gradients(case, results, _inputs(x, states, module, case))


def run_ours(case: Case, backend: str | None = None) -> dict[str, Tensor]:
    module = case.module(sk)
    module.backend = backend
    x, states = case.data()
    hx = states if case.state else None
    if case.layout.startswith("packed"):
        packed = pack_padded_sequence(x, case.lengths, enforce_sorted=case.layout == "packed_sorted")
        output, final = _call(module, packed, hx, case)
        output = pad_packed_sequence(output)[0]
    elif case.layout == "cu_seqlens":
        ends = on_device((0, *case.lengths), backend).cumsum(0)
        options = {k: v for k, v in case.module_options.items() if k not in ("dtype", "batch_first", "proj_size")}
        function = getattr(sk.functional, case.cell[:3] if case.cell.startswith("rnn") else case.cell)
        given = hx if case.cell == "lstm" or hx is None else hx[0]
        output, final = function(
            _cut(x, case.lengths), given, module._flat_weights, cu_seqlens=ends, backend=backend, **options
        )
        final = final if case.cell == "lstm" else (final,)
    else:
        lengths = on_device(case.lengths, backend) if case.layout == "lengths" else None
        output, final = _call(module, _in_layout(x, case), hx, case, lengths)
        if case.layout == "unbatched":
            output, final = output.unsqueeze(1), tuple(f.unsqueeze(1) for f in final)
        elif case.batch_first:
            output = output.transpose(0, 1)
    if case.layout == "lengths":
        behind = torch.arange(case.steps).unsqueeze(1) >= torch.tensor(case.lengths)
        assert not output[behind].any(), "what lies behind a sequence's end is zero"
    output = output if case.layout == "cu_seqlens" else _cut(output, case.lengths)
    results = {"output": output} | dict(zip(("h_n", "c_n"), final, strict=False))
    return _gradients(case, results, _inputs(x, states, module, case))


def _in_layout(x: Tensor, case: Case) -> Tensor:
    if case.layout == "unbatched":
        return x.squeeze(1)
    return x.transpose(0, 1) if case.batch_first else x


def _call(module: nn.Module, x, hx, case: Case, lengths: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    if hx is not None and case.layout == "unbatched":
        hx = tuple(h.squeeze(1) for h in hx)
    if hx is not None and case.cell != "lstm":
        hx = hx[0]
    output, final = module(x, hx) if lengths is None else module(x, hx, lengths=lengths)
    return output, final if case.cell == "lstm" else (final,)


@st.composite
def generated(draw, dtypes=DTYPES, of=CELLS) -> Case:
    """Any configuration of small size, drawn so that the awkward ones are frequent."""
    cell = draw(st.sampled_from(of))
    layout = draw(st.sampled_from(LAYOUTS))
    shortest = 0 if layout in ("lengths", "cu_seqlens") else 1
    if layout == "unbatched":
        lengths = (draw(st.integers(1, 7)),)
    elif layout == "padded":
        lengths = (draw(st.integers(1, 7)),) * draw(st.integers(1, 6))
    else:
        lengths = tuple(draw(st.lists(st.integers(shortest, 7), min_size=1, max_size=6)))
        lengths = lengths if max(lengths) else (1, *lengths[1:])
    if layout == "packed_sorted":
        lengths = tuple(sorted(lengths, reverse=True))
    hidden = draw(st.sampled_from((1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 32, 33, 40)))
    projected = draw(st.integers(1, hidden - 1)) if cell == "lstm" and hidden > 1 and draw(st.booleans()) else 0
    return Case(
        cell,
        draw(st.sampled_from(dtypes)),
        layout,
        lengths,
        draw(st.integers(1, 6)),
        hidden,
        projected,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        layout in ("padded", "unbatched", "lengths") and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(("contiguous", "strided", "expanded"))),
        draw(st.integers(0, 2**16)),
    )
