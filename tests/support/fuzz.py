"""Random calls, valid and invalid: operators beside torch_eager, modules beside torch.nn, checkpoints with damage.

Each subject is a function of a seed that raises if something is wrong; tests/ops/test_fuzz.py runs them.
"""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from operators import BACKENDS, CELLS, Call, backward, forward
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels as sk
from benchmarks import InputError, checkpoint

Result = list[Tensor] | Exception


def result_of(run: Callable[[], list[Tensor]]) -> Result:
    try:
        return run()
    except Exception as error:  # whichever: it is compared
        return error


def assert_alike(found: Result, expected: Result, **tolerance: float) -> None:
    """Both have the same values, or both raise exceptions of one kind."""
    for one, other in ((found, expected), (expected, found)):
        if isinstance(one, Exception) and not isinstance(other, type(one)):
            raise AssertionError(f"found {found!r}, expected {expected!r}") from one
    if not isinstance(found, Exception):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **tolerance)


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


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "fewer dimensions": lambda tensor: tensor.reshape(-1)[:1].squeeze(0),
    "one row more": lambda tensor: torch.cat([tensor, tensor[:1]]) if len(tensor) else tensor.unsqueeze(0),
    "another dtype": lambda tensor: tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32),
    "no data": lambda tensor: tensor.to("meta"),
}


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def operators(seed: int) -> None:
    draw = random.Random(seed)
    backend = draw.choice([name for name in BACKENDS if name != "torch_eager"])
    cell, size = draw.choice(CELLS), lambda: draw.choice((0, 1, 2, 3, 5, 8, 17))
    sequences, steps = size(), draw.randrange(5)
    batch_sizes = None
    if draw.random() < 0.5:
        batch_sizes = tuple(sorted((draw.randrange(sequences + 1) for _ in range(steps)), reverse=True))
    call = Call(
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
        torch.float32 if backend == "triton" or draw.random() < 0.5 else torch.float64,
        seed,
    )
    _, x, weights, h_0, c_0, sizes, save = call.arguments()
    x, h_0, weights = as_view(draw, x), as_view(draw, h_0), [as_view(draw, weight) for weight in weights]
    y, h_n, c_n, saved = forward("torch_eager")(cell, x, weights, h_0, c_0, sizes, True)
    grads = [torch.randn_like(tensor) if draw.random() < 0.8 else None for tensor in (y, h_n, c_n)]
    layer = [x, *weights, h_0, c_0, sizes]
    grads, wants = [*grads[:2], grads[2] if cell == "lstm" else None], [draw.random() < 0.7 for _ in range(2)]
    if draw.random() < 0.4:  # something is wrong with one of the layer's arguments
        k = draw.choice([k for k, tensor in enumerate(layer) if tensor is not None])
        damage = draw.choice([*DAMAGES.values(), *([freed] if layer[k].numel() else [])])
        layer[k] = damage(layer[k])
    x, *weights, h_0, c_0, sizes = layer
    arguments = x, weights, h_0, c_0, sizes

    def both_passes(name: str) -> list[Tensor]:
        results = forward(name)(cell, *arguments, save)
        grad_x, grad_weights, *grad_states = backward(name)(cell, *grads, *arguments, y, saved, *wants)
        return [*results, grad_x, *grad_weights, *grad_states]

    expected, found = (result_of(lambda name=name: both_passes(name)) for name in ("torch_eager", backend))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if call.dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    try:
        assert_alike(found, expected, **tolerance)
    except AssertionError as error:
        raise AssertionError(f"{backend}: {call}, {[None if t is None else tuple(t.shape) for t in layer]}") from error


# ---- modules


def random_module(draw: random.Random) -> tuple[str, tuple[int, int], dict]:
    name = draw.choice(("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"))
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


def modules(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    name, sizes, options = random_module(draw)
    expected, ours = getattr(torch.nn, name)(*sizes, **options), getattr(sk, name)(*sizes, **options)
    ours.load_state_dict(expected.state_dict())
    input, hx = random_input(draw, expected, name)
    if draw.random() < 0.1:  # a parameter of another device
        parameter = draw.choice(list(dict(expected.named_parameters())))
        for module in (expected, ours):
            setattr(module, parameter, torch.nn.Parameter(getattr(module, parameter).detach().to("meta")))
    if draw.random() < 0.1 and isinstance(input, Tensor):
        input = input.to(draw.choice((torch.float64, torch.int64)))

    def train(module: torch.nn.Module) -> list[Tensor]:
        module.zero_grad()
        data = input.data if isinstance(input, PackedSequence) else input
        leaf = data.clone().requires_grad_(data.is_floating_point())
        output = module(input._replace(data=leaf) if isinstance(input, PackedSequence) else leaf, hx)
        tensors = [
            t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
        ]
        sum(t.square().sum() for t in tensors).backward()
        return [*tensors, leaf.grad, *(p.grad for p in module.parameters())]

    try:
        assert_alike(result_of(lambda: train(ours)), result_of(lambda: train(expected)), rtol=1e-4, atol=1e-5)
    except AssertionError as error:
        shape = tuple((input.data if isinstance(input, PackedSequence) else input).shape)
        states = [tuple(state.shape) for state in torch.utils._pytree.tree_leaves(hx) if state is not None]
        raise AssertionError(f"{name}{sizes} {options}, input {shape}, hx {states}") from error


# ---- checkpoints


def checkpoints(seed: int) -> None:
    """Bits flipped, ends cut off, bytes added: the whole content comes back, or one error that says it does not."""
    draw = random.Random(seed)
    content = {
        "task": "names",
        "options": {"seed": seed},
        "runs": [{"weights": torch.arange(40.0), "loss": [0.5, 0.25]}],
    }
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        checkpoint.save(path, content)
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 1, 1, 8))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        if draw.random() < 0.1:
            data += bytes(draw.randrange(1, 40))
        path.write_bytes(data)
        try:
            loaded = checkpoint.load(path)
        except InputError:
            return
        assert str(loaded) == str(content)


SUBJECTS: dict[str, Callable[[int], None]] = {"operators": operators, "modules": modules, "checkpoints": checkpoints}
