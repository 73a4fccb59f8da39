"""Random calls, valid and invalid: operators beside torch_eager, modules beside torch.nn.

Each subject is a function of a seed that raises if something is wrong; tests/ops/test_fuzz.py runs them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from operators import BACKENDS, CELLS, Call, backward, forward, to_float64
from tolerances import assert_as_close_as_torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence
from torch.utils._pytree import tree_leaves, tree_map

import seqkernels as sk

IN_16_BITS = torch.bfloat16, torch.float16
SEVERAL = 3  # draws of the numbers of a call in 16 bits: in a single draw errors may cancel by chance
TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}
Result = list[Tensor] | Exception


def result_of(run: Callable[[], list[Tensor]]) -> Result:
    try:
        return run()
    except Exception as error:  # of any kind: it is compared
        return error


def assert_alike(found: Result, expected: Result, dtype: torch.dtype, in_float64: Callable[[], list[Tensor]]) -> None:
    """Both have the same values (in 16 bits both are as near to float64), or both raise the same kind of exception."""
    for one, other in ((found, expected), (expected, found)):
        if isinstance(one, Exception) and not isinstance(other, type(one)):
            raise AssertionError(f"found {found!r}, expected {expected!r}") from one
    if isinstance(found, Exception):
        return
    assert [tensor is None for tensor in found] == [tensor is None for tensor in expected]
    if dtype in TOLERANCES:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCES[dtype])
        return
    named = [
        {str(k): tensor for k, tensor in enumerate(tensors) if tensor is not None}
        for tensors in (found, expected, in_float64())
    ]
    assert_as_close_as_torch(*([each] for each in named), dtype)


# ---- operators


def as_view(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in other places of memory."""
    kind = draw.randrange(3)
    if kind == 0 or tensor.dim() == 0:
        return tensor.clone()
    if kind == 1:  # every second column, or every second number
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    return torch.cat([tensor.new_full((1,), float("nan")), tensor.reshape(-1)])[1:].view(tensor.shape)


DAMAGES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "fewer dimensions": lambda _, tensor: tensor.reshape(-1)[:1].squeeze(0),
    "one row more": lambda _, tensor: torch.cat([tensor, tensor[:1]]) if len(tensor) else tensor.unsqueeze(0),
    "another dtype": lambda _, tensor: tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32),
    "no data": lambda _, tensor: tensor.to("meta"),
}


def shrunk(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same view of a storage that does not hold all of it."""
    reached = tensor.storage_offset() + 1
    reached += sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = reached * tensor.itemsize
    tensor.untyped_storage().resize_(draw.choice((0, needed - 1, draw.randrange(needed))))
    return tensor


def random_call(draw: random.Random, dtypes: Sequence[torch.dtype], seed: int) -> Call:
    cell, size = draw.choice(CELLS), lambda: draw.choice((0, 1, 2, 3, 5, 8, 17))
    sequences, steps = size(), draw.randrange(5)
    batch_sizes = None
    if draw.random() < 0.5:
        batch_sizes = tuple(sorted((draw.randrange(sequences + 1) for _ in range(steps)), reverse=True))
    return Call(
        cell,
        draw.choice((1, 2)),
        sequences,
        steps,
        size(),
        size(),
        size() if cell == "lstm" and draw.random() < 0.3 else None,
        batch_sizes,
        draw.randrange(3) if batch_sizes is not None else 0,
        draw.random() < 0.7,
        draw.choice(dtypes),
        seed,
    )


def tensors_of(draw: random.Random, call: Call, grads: Sequence[bool]) -> list[Tensor | None]:
    """grad_y, grad_h_n and grad_c_n (None where `grads` says so), y, saved, x, weights, h_0, c_0 and batch_sizes."""
    cell, x, weights, h_0, c_0, sizes, _ = call.arguments()
    y, h_n, c_n, saved = forward("torch_eager")(cell, x, weights, h_0, c_0, sizes, True)
    of = zip((y, h_n, c_n), grads, strict=True)
    tensors = [*(torch.randn_like(tensor) if there else None for tensor, there in of), y, saved, x, *weights, h_0, c_0]
    return [*(tensor if tensor is None else as_view(draw, tensor) for tensor in tensors), sizes]


def operators(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    backend = draw.choice([name for name in BACKENDS if name != "torch_eager"])
    call = random_call(draw, (torch.float32, *IN_16_BITS, *([] if backend == "triton" else [torch.float64])), seed)
    grads = draw.random() < 0.8, draw.random() < 0.8, draw.random() < 0.8 and call.cell == "lstm"
    save, wants = draw.random() < 0.8, [draw.random() < 0.7 for _ in range(2)]
    several = range(SEVERAL if call.dtype in IN_16_BITS else 1)
    numbers = [tensors_of(draw, replace(call, seed=seed + k), grads) for k in several]
    if draw.random() < 0.4:  # something is wrong with one of the tensors
        first = numbers[0]
        k = draw.choice([k for k, tensor in enumerate(first) if tensor is not None])
        damage = draw.choice([*DAMAGES.values(), *([shrunk] if first[k].numel() else [])])
        first[k] = damage(draw, first[k])

    def both_passes(name: str, tensors: list[Tensor | None]) -> list[Tensor]:
        *grads, y, saved, x = tensors[:6]
        layer = x, tensors[6:-3], *tensors[-3:]
        results = forward(name)(call.cell, *layer, save)
        grad_x, grad_weights, *grad_states = backward(name)(call.cell, *grads, *layer, y, saved, *wants)
        return [*results, grad_x, *grad_weights, *grad_states]

    def all_passes(name: str, numbers: list = numbers) -> list[Tensor]:
        return [torch.stack(each) for each in zip(*(both_passes(name, tensors) for tensors in numbers), strict=True)]

    expected, found = (result_of(lambda name=name: all_passes(name)) for name in ("torch_eager", backend))
    try:
        assert_alike(found, expected, call.dtype, lambda: all_passes("torch_eager", to_float64(numbers)))
    except AssertionError as error:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in numbers[0]]
        raise AssertionError(f"{backend}: {call}, {shapes}") from error


# ---- modules


LAYERS = "RNN", "GRU", "LSTM"


def random_module(draw: random.Random, names: tuple[str, ...]) -> tuple[str, tuple[int, int], dict]:
    name = draw.choice(names)
    options = {"bias": draw.random() < 0.7}
    if name.startswith("RNN"):
        options["nonlinearity"] = draw.choice(("tanh", "relu"))
    if not name.endswith("Cell"):
        options |= {"num_layers": draw.choice((1, 1, 2, 3)), "bidirectional": draw.random() < 0.5}
        options["batch_first"] = draw.random() < 0.5
    if name == "LSTM" and draw.random() < 0.3:
        options["proj_size"] = 2
    return name, (draw.choice((1, 3, 8)), draw.choice((3, 5, 16))), options


def random_input(draw: random.Random, module: torch.nn.Module, name: str) -> tuple[Tensor | PackedSequence, object]:
    """Input and state of a module, of which some have a wrong size."""
    packed = not name.endswith("Cell") and draw.random() < 0.3
    wrong = not packed and draw.random() < 0.25  # torch.nn takes packed batches and their states of wrong sizes
    off = lambda size: size + (wrong and draw.random() < 0.4)  # noqa: E731
    B, I, H = draw.choice((1, 2, 5)), module.input_size, module.hidden_size  # noqa: E741
    if name.endswith("Cell"):
        shape = (off(I),) if draw.random() < 0.3 else (B, off(I))
        states = [torch.randn(*([off(B)] if len(shape) == 2 else []), off(H)) for _ in range(1 + (name == "LSTMCell"))]
        input = torch.randn(*shape, *([1] * (wrong and draw.random() < 0.2)))
    else:
        T = draw.choice((0, 1, 2, 6) if wrong else (1, 2, 6))
        unbatched = not packed and draw.random() < 0.2
        shape = (T, off(I)) if unbatched else (B, T, off(I)) if module.batch_first else (T, B, off(I))
        input = torch.randn(shape)
        widths = [module.proj_size or H, H][: 1 + (name == "LSTM")]
        count = module.num_layers * (1 + module.bidirectional)
        if packed:
            lengths = torch.tensor([draw.randint(1, T) for _ in range(B)])
            input = pack_padded_sequence(input, lengths, module.batch_first, enforce_sorted=False)
        states = [torch.randn(off(count), *([] if unbatched else [off(B)]), off(width)) for width in widths]
    given = (tuple(states) if name.startswith("LSTM") else states[0]) if draw.random() < 0.6 else None
    return input, given


def changed(change: Callable[[Tensor], Tensor], tree: object) -> object:
    """With other floating-point tensors."""
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def modules(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    name, sizes, options = random_module(draw, (*LAYERS, "RNNCell", "GRUCell", "LSTMCell"))
    dtype = torch.float32 if draw.random() < 0.7 or options.get("nonlinearity") == "relu" else draw.choice(IN_16_BITS)
    expected, ours = (getattr(of, name)(*sizes, **options, dtype=dtype) for of in (torch.nn, sk))
    ours.load_state_dict(expected.state_dict())
    input, hx = changed(lambda x: x.to(dtype), random_input(draw, expected, name))
    if draw.random() < 0.1:  # a parameter of another device
        parameter = draw.choice(list(dict(expected.named_parameters())))
        for module in (expected, ours):
            setattr(module, parameter, torch.nn.Parameter(getattr(module, parameter).detach().to("meta")))
    if draw.random() < 0.1 and isinstance(input, Tensor):
        input = input.to(draw.choice((torch.float64, torch.int64)))
    used = draw.choice(([0], [-1], [0, -1], [0, 1, -1]))  # of the results
    numbers = [(input, hx)]
    if dtype in IN_16_BITS:
        numbers += [changed(torch.randn_like, (input, hx)) for _ in range(SEVERAL - 1)]

    def train(module: torch.nn.Module, input: Tensor | PackedSequence, hx: object) -> list[Tensor]:
        module.zero_grad()
        data = input.data if isinstance(input, PackedSequence) else input
        leaf = data.clone().requires_grad_(data.is_floating_point())
        output = module(input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf, hx)
        tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        sum(tensors[k].square().sum() for k in used if k < len(tensors)).backward()
        return [*tensors, leaf.grad, *(p.grad for p in module.parameters())]

    def train_all(module: torch.nn.Module, numbers: list = numbers) -> list[Tensor | None]:
        results = [train(module, *each) for each in numbers]
        return [None if each[0] is None else torch.stack(each) for each in zip(*results, strict=True)]

    try:
        assert_alike(
            *(result_of(lambda module=module: train_all(module)) for module in (ours, expected)),
            dtype,
            lambda: train_all(expected.double(), changed(Tensor.double, numbers)),
        )
    except AssertionError as error:
        shape = tuple((input.data if isinstance(input, PackedSequence) else input).shape)
        states = [tuple(state.shape) for state in tree_leaves(hx) if state is not None]
        raise AssertionError(f"{name}{sizes} {options} {dtype}, input {shape}, hx {states}, {used}") from error


# ---- sequences of different lengths

# What is wrong with lengths or cu_seqlens, and the error.
BAD_LENGTHS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "one more": (lambda lengths: torch.cat([lengths, lengths[:1]]), ValueError),
    "a matrix": (lambda lengths: lengths.unsqueeze(0), ValueError),
    "floats": (lambda lengths: lengths.double(), TypeError),
    "truths": (lambda lengths: lengths > 0, TypeError),
    "negative": (lambda lengths: -1 - lengths, ValueError),
    "too long": (lambda lengths: lengths + 9, ValueError),
}
BAD_ENDS = BAD_LENGTHS | {
    "one more": (lambda ends: torch.cat([ends, ends[-1:] + 1]), ValueError),
    "not from zero": (lambda ends: torch.cat([ends[:1] - 1, ends[1:]]), ValueError),
    "falling": (lambda ends: torch.cat([ends, ends[:1] - 1, ends[-1:]]), ValueError),
}


def sequences(seed: int) -> None:
    """`lengths` and `cu_seqlens`, valid and invalid, beside torch.nn on each sequence alone."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    name, sizes, options = random_module(draw, LAYERS)
    alone, ours = (getattr(of, name)(*sizes, **options, dtype=torch.float64) for of in (torch.nn, sk))
    ours.load_state_dict(alone.state_dict())
    lengths = torch.tensor([draw.choice((0, 1, 2, 6)) for _ in range(draw.choice((1, 2, 5)))])
    x = torch.randn(int(lengths.sum()), sizes[0], dtype=torch.float64)
    count, widths = alone.num_layers * (1 + alone.bidirectional), (alone.proj_size or sizes[1], sizes[1])
    states = [torch.randn(count, len(lengths), width, dtype=torch.float64) for width in widths[: 1 + (name == "LSTM")]]
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    by_ends, wrong = draw.random() < 0.5, draw.random() < 0.4
    change, error = draw.choice(list((BAD_ENDS if by_ends else BAD_LENGTHS).values()))
    given = (ends if by_ends else lengths).to(draw.choice((torch.int32, torch.int64)))
    given = change(given) if wrong else given if by_ends or draw.random() < 0.5 else given.tolist()

    def run_ours(x: Tensor, states: list[Tensor]) -> list[Tensor]:
        hx = tuple(states) if name == "LSTM" else states[0]
        if by_ends:
            same = {key: value for key, value in options.items() if key not in ("batch_first", "proj_size")}
            function, longest = getattr(sk.functional, name.lower()), draw.choice((None, 6, 1 << 40))
            y, final = function(x, hx, ours._flat_weights, **same, cu_seqlens=given, max_seqlen=longest)
            return [y, *tree_leaves(final)]
        padded = pad_sequence(x.split(lengths.tolist()), alone.batch_first, float("nan"))
        y, final = ours(padded, hx, lengths=given)
        y = y.transpose(0, 1) if alone.batch_first else y
        assert not any(y[length:, b].any() for b, length in enumerate(lengths))
        return [torch.cat([y[:length, b] for b, length in enumerate(lengths)]), *tree_leaves(final)]

    def run_alone(x: Tensor, states: list[Tensor]) -> list[Tensor]:
        results = []
        for b, one in enumerate(x.split(lengths.tolist())):
            hx = [state[:, b] for state in states]
            y, final = alone(one, tuple(hx) if name == "LSTM" else hx[0]) if len(one) else (one[:, :0], hx)
            results.append([y, *tree_leaves(final)])
        y, *final = zip(*results, strict=True)
        none = x.new_zeros(0, (1 + alone.bidirectional) * widths[0])
        return [torch.cat([none, *(each for each in y if len(each))]), *(torch.stack(each, 1) for each in final)]

    def train(run: Callable, module: torch.nn.Module) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *states)]
        outputs = run(leaves[0], leaves[1:])
        inputs = [*leaves, *module.parameters()]
        loss = sum(tensor.square().sum() for tensor in outputs)
        return [*outputs, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]

    try:
        found = result_of(lambda: train(run_ours, ours))
        if wrong:
            assert type(found) is error, f"found {found!r}, expected {error.__name__}"
        else:
            assert_alike(found, train(run_alone, alone), torch.float64, list)
    except AssertionError as error:
        raise AssertionError(f"{name}{sizes} {options}, {lengths.tolist()}, {given}") from error


SUBJECTS: dict[str, Callable[[int], None]] = {"operators": operators, "modules": modules, "sequences": sequences}
