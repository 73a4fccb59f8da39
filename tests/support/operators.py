"""The operator pair: calls of it, what both of its passes compute, and what decides that this is right."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from seqkernels import select
from seqkernels.backends import cells, torch_eager
from seqkernels.hardware import THIS_MACHINE

ON_GPU = torch.get_default_device().type != "cpu"
NO_CPU_KERNELS = THIS_MACHINE.native_missing or ("these tests run on a GPU, and CPU kernels do not" if ON_GPU else "")
MISSING = {
    "cpu": NO_CPU_KERNELS,
    "cuda": THIS_MACHINE.cuda_missing or THIS_MACHINE.emulator == ON_GPU,
    "triton": not THIS_MACHINE.triton,
    "cudnn": True,  # it has no operators
}
BACKENDS = [backend for backend in select.BACKENDS if not MISSING.get(backend)]
CELLS = tuple(cells.CELLS)


def _slow(interpreted: bool) -> list:
    """Triton's interpreter takes seconds where a kernel takes microseconds."""
    return [pytest.mark.slow] * (interpreted and not ON_GPU)


SLOW_MARKED = [pytest.param(name, marks=_slow(name == "triton")) for name in BACKENDS]
PAIRS = [
    pytest.param(first, second, marks=_slow("triton" in (first, second) and "torch_eager" not in (first, second)))
    for first in BACKENDS
    for second in BACKENDS
]


@dataclass
class Call:
    """Arguments of recurrence_forward."""

    cell: str
    directions: int = 1
    sequences: int = 3
    steps: int = 4
    hidden: int = 5
    input: int = 3
    projected: int | None = None
    batch_sizes: tuple[int, ...] | None = None
    spare_rows: int = 0  # rows behind the last step
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    layers: int = 1

    def arguments(self, requires_grad: bool = False, save: bool = True) -> tuple:
        generator = torch.Generator("cpu").manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
            return x.to(torch.get_default_device(), self.dtype).requires_grad_(requires_grad)

        def weight(*shape: int) -> Tensor:
            # So small that rounding errors do not grow from step to step.
            return (random(*shape).detach() / (2 * shape[-1] ** 0.5)).requires_grad_(requires_grad)

        D, B, H = self.directions, self.sequences, self.hidden
        P = H if self.projected is None else self.projected
        rows = (self.steps * B if self.batch_sizes is None else sum(self.batch_sizes)) + self.spare_rows
        gates = cells.CELLS[self.cell].gates * H
        weights = []
        for k in range(self.layers * D):
            weights += [weight(gates, self.input if k < D else D * P), weight(gates, P)]
            weights += [random(gates), random(gates)] if self.bias else []
            weights += [weight(P, H)] if self.projected is not None else []
        return (
            self.cell,
            random(rows, self.input),
            weights,
            random(self.layers * D, B, P),
            random(self.layers * D, B, H) if self.cell == "lstm" else None,
            None if self.batch_sizes is None else torch.tensor(self.batch_sizes, dtype=torch.int64),
            save,
            *(([], self.layers) if self.layers > 1 else ()),
        )


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """What torch and the CPU kernels allocate starts as NaN, so that a result that is not computed is noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native = not THIS_MACHINE.native_missing
    if native:
        from seqkernels import _C

        _C.fill_memory(True)
    try:
        yield
    finally:
        if native:
            _C.fill_memory(False)
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def forward(backend: str):
    return getattr(torch.ops.seqkernels.recurrence_forward, backend)


def backward(backend: str):
    return getattr(torch.ops.seqkernels.recurrence_backward, backend)


def recompute(backend: str):
    return getattr(torch.ops.seqkernels.recurrence_recompute, backend)


def both_passes(call: Call, run_forward, run_backward) -> list[Tensor]:
    """All outputs of forward and backward, for random gradients of the outputs."""
    cell, *layer, save = call.arguments()[:7]
    options = call.arguments()[7:]
    y, h_n, c_n, saved = run_forward(cell, *layer, save, *options)
    generator = torch.Generator("cpu").manual_seed(call.seed + 1)
    grads = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in (y, h_n, c_n)]
    grads[2] = grads[2] if cell == "lstm" else None
    grad_x, grad_weights, *grad_states = run_backward(cell, *grads, *layer, y, saved, True, True, *options)
    return [y, h_n, c_n, saved, grad_x, *grad_weights, *grad_states]


def layer_by_layer(call: Call, run_forward, run_backward) -> list[Tensor]:
    """`both_passes`, but for what is saved, by calls of the operators for one layer each."""
    L = call.layers
    cell, x, weights, h_0, c_0, batch_sizes, *_ = call.arguments()
    each = len(weights) // L
    states = list(zip(h_0.chunk(L), [None] * L if c_0 is None else c_0.chunk(L), strict=True))
    xs, results = [x], []
    for k in range(L):
        of_layer = weights[k * each : (k + 1) * each]
        results.append(run_forward(cell, xs[-1], of_layer, *states[k], batch_sizes, True))
        xs.append(results[-1][0])
    h_n, c_n = (torch.cat([result[k] for result in results]) for k in (1, 2))
    generator = torch.Generator("cpu").manual_seed(call.seed + 1)
    grad_y, grad_h_n, grad_c_n = (
        torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in (xs[-1], h_n, c_n)
    )
    grad_weights, grads_h_0, grads_c_0 = [], [], []
    for k in reversed(range(L)):
        of_layer = weights[k * each : (k + 1) * each]
        grads = grad_y, grad_h_n.chunk(L)[k], grad_c_n.chunk(L)[k] if cell == "lstm" else None
        layer = xs[k], of_layer, *states[k], batch_sizes
        grad_y, own, grad_h_0, grad_c_0 = run_backward(cell, *grads, *layer, xs[k + 1], results[k][3], True, True)
        grad_weights = [*own, *grad_weights]
        grads_h_0.insert(0, grad_h_0)
        grads_c_0.insert(0, grad_c_0)
    return [xs[-1], h_n, c_n, grad_y, *grad_weights, torch.cat(grads_h_0), torch.cat(grads_c_0)]


def to_float64(args) -> list:
    """Floating tensors, also those in lists, as float64."""
    return [
        to_float64(a)
        if isinstance(a, (list, tuple))
        else a.double()
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def in_float64(call: Call) -> list[Tensor]:
    """Both passes by torch_eager in float64, which test_specification judges."""
    return both_passes(
        call,
        lambda *args: torch_eager.forward(*to_float64(args)),
        lambda *args: torch_eager.backward(*to_float64(args)),
    )


def for_backends(call: Call, *backends: str) -> Call:
    """The call in a dtype that all of them take."""
    return replace(call, dtype=torch.float32) if "triton" in backends else call


def assert_as_in_float64(found: list[Tensor], call: Call) -> None:
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if call.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for ours, expected in zip(found, in_float64(call), strict=True):
        torch.testing.assert_close(ours.double(), expected, **tolerance)


SHAPES = {
    "padded": {},
    "two directions": {"directions": 2},
    "ragged": {"batch_sizes": (4, 4, 2, 1), "sequences": 4},
    "ragged both ways": {"batch_sizes": (4, 3, 1), "sequences": 4, "directions": 2},
    "empty sequences": {"batch_sizes": (2, 1), "sequences": 4, "directions": 2},
    "steps in which nothing runs": {"batch_sizes": (2, 1, 0, 0), "sequences": 3, "directions": 2},
    "spare rows": {"batch_sizes": (3, 1), "sequences": 3, "spare_rows": 3, "directions": 2},
    "all sequences empty": {"batch_sizes": (0, 0), "sequences": 2, "directions": 2},
    "no steps": {"steps": 0},
    "no sequences": {"sequences": 0, "steps": 0},
    "one unit": {"hidden": 1, "sequences": 2},
    "one row off the vectors": {"hidden": 17, "sequences": 9},
    "whole vectors": {"hidden": 32, "sequences": 16, "directions": 2},
    "many rows": {"hidden": 33, "sequences": 131, "steps": 3, "batch_sizes": (131, 130, 67)},
    "many units": {"hidden": 129, "sequences": 5, "steps": 2},
    # Deeper than a slice of a panel, and more rows than a chunk of gates or of gradients.
    "deep": {"hidden": 200, "input": 401, "sequences": 4, "steps": 3},
    "long": {"hidden": 9, "sequences": 7, "steps": 150},
    # Few sequences: threads share the units of a step.
    "one long sequence": {"hidden": 130, "sequences": 1, "steps": 9},
    "two long sequences both ways": {"hidden": 150, "sequences": 2, "batch_sizes": (2, 2, 2, 1, 1, 1), "directions": 2},
}


def calls(dtype: torch.dtype = torch.float64, **more) -> list:
    named = []
    for cell in CELLS:
        for name, shape in SHAPES.items():
            named.append(pytest.param(Call(cell, dtype=dtype, **shape, **more), id=f"{cell}-{name}"))
            if cell == "lstm":
                projected = Call(cell, dtype=dtype, **{"hidden": 5, **shape}, **more)
                projected.projected = max(1, projected.hidden // 2)
                named.append(pytest.param(projected, id=f"{cell}-{name}-projected"))
            if cell == "gru":
                named.append(
                    pytest.param(Call(cell, bias=False, dtype=dtype, **shape, **more), id=f"gru-{name}-no bias")
                )
    return named


def assert_rounding_alone(call: Call, backend: str) -> None:
    assert_rounding_alone_of(call, forward(backend), backward(backend))


def assert_rounding_alone_of(call: Call, run_forward, run_backward, eps: float | None = None) -> None:
    """Each output errs by a few units of its dtype, or of `eps`, against float64. The float64 backward starts from the
    forward under test: where a relu rounds across zero, its gradient is another, which is no error of the backward."""
    ours = both_passes(call, run_forward, run_backward)
    y, saved = ours[0].double(), ours[3].double()
    layer = to_float64(call.arguments())[1:-1]
    expected = both_passes(
        Call(**{**vars(call), "dtype": torch.float64}),
        lambda *_: torch_eager.forward(call.cell, *layer, True),
        lambda cell, gy, gh, gc, *_: torch_eager.backward(cell, gy, gh, gc, *layer, y, saved, True, True),
    )
    for value, right in zip(ours, expected, strict=True):
        error = (value.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert value.dtype == call.dtype and error <= 8 * (eps or torch.finfo(call.dtype).eps)


def assert_an_infinite_last_state_is_no_factor(run_forward, run_backward) -> None:
    """The row behind the last step has no previous state: the state of the row before it, times zero, would be NaN."""
    call = Call("rnn_relu", sequences=2, batch_sizes=(2, 1), spare_rows=1, dtype=torch.float32)
    cell, x, weights, *states, batch_sizes, save = call.arguments()
    x[1], weights[0][:] = 1e30, 1e30
    layer = x, weights, *states, batch_sizes
    y, _, _, saved = run_forward(cell, *layer, save)
    assert y[1].isinf().all() and y[[0, 2]].isfinite().all()
    _, grads, *_ = run_backward(cell, torch.ones_like(y), None, None, *layer, y, saved, True, True)
    assert all(grad.isfinite().all() for grad in grads)


BELOW_FLOAT64 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
