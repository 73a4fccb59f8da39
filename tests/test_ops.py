"""The operator pair on every backend and instruction set. Runs under the sanitizers as well."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from seqkernels import ops, select
from seqkernels.backends import torch_eager
from seqkernels.hardware import HERE

BACKENDS = [b for b in select.BACKENDS if b != "cpu" or HERE.native]
CELLS = tuple(ops.GATES)


@dataclass
class Call:
    """Arguments of recurrence_forward."""

    cell: str
    directions: int = 1
    sequences: int = 3
    steps: int = 4
    hidden: int = 5
    projected: int | None = None
    batch_sizes: tuple[int, ...] | None = None
    spare_rows: int = 0  # rows behind the last step
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def arguments(self, requires_grad: bool = False, save: bool = True) -> tuple:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return x.requires_grad_(requires_grad)

        D, B, H, P = self.directions, self.sequences, self.hidden, self.projected or self.hidden
        rows = (self.steps * B if self.batch_sizes is None else sum(self.batch_sizes)) + self.spare_rows
        gates = ops.GATES[self.cell] * H
        return (
            self.cell,
            random(rows, D, gates),
            random(D, gates, P),
            random(D, gates) if self.cell == "gru" and self.bias else None,
            random(D, P, H) if self.projected else None,
            random(D, B, P),
            random(D, B, H) if self.cell == "lstm" else None,
            None if self.batch_sizes is None else torch.tensor(self.batch_sizes),
            save,
        )


def forward(backend: str):
    return getattr(torch.ops.seqkernels.recurrence_forward, backend)


def backward(backend: str):
    return getattr(torch.ops.seqkernels.recurrence_backward, backend)


def both_passes(call: Call, run_forward, run_backward) -> list[Tensor]:
    """All outputs of forward and backward, for random gradients of the outputs."""
    cell, *tensors, save = call.arguments()
    y, h_n, c_n, saved = run_forward(cell, *tensors, save)
    generator = torch.Generator().manual_seed(call.seed + 1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (y, h_n, c_n)]
    grads[2] = grads[2] if cell == "lstm" else None
    return [y, h_n, c_n, saved, *run_backward(cell, *grads, *tensors, y, saved)]


def in_float64(call: Call) -> list[Tensor]:
    """Both passes by torch_eager in float64, which test_specification judges."""

    def wide(*args):
        return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]

    return both_passes(
        call, lambda *args: torch_eager.forward(*wide(*args)), lambda *args: torch_eager.backward(*wide(*args))
    )


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
    "wide": {"hidden": 129, "sequences": 5, "steps": 2},
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


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def instruction_set(request):
    if not HERE.native:
        pytest.skip(HERE.native_missing)
    from seqkernels import _C

    before = _C.isa()
    try:
        _C.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.force_isa(before)


@pytest.mark.parametrize("call", calls())
def test_every_instruction_set_gives_what_torch_eager_gives(call, instruction_set):
    for ours, expected in zip(both_passes(call, forward("cpu"), backward("cpu")), in_float64(call), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def assert_rounding_alone(call: Call, backend: str) -> None:
    """Each output errs by a few units of its dtype against float64. The float64 backward starts from the forward under
    test: a relu whose input rounds across zero has another gradient, which is no error of the backward."""
    ours = both_passes(call, forward(backend), backward(backend))
    y, saved = ours[0].double(), ours[3].double()
    wide = Call(**{**vars(call), "dtype": torch.float64})
    narrow = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in call.arguments()]
    expected = both_passes(
        wide,
        lambda *_: torch_eager.forward(*narrow),
        lambda cell, gy, gh, gc, *_: torch_eager.backward(cell, gy, gh, gc, *narrow[1:-1], y, saved),
    )
    for value, right in zip(ours, expected, strict=True):
        error = (value.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert value.dtype == call.dtype and error <= 8 * torch.finfo(call.dtype).eps


NARROW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@NARROW
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_dtypes_err_by_their_rounding_alone(cell, dtype, backend):
    assert_rounding_alone(Call(cell, 2, 5, 6, 37, batch_sizes=(5, 5, 3, 2, 2, 1), dtype=dtype), backend)


@NARROW
@pytest.mark.parametrize("cell", CELLS)
def test_every_instruction_set_errs_by_rounding_alone_in_narrow_dtypes(cell, dtype, instruction_set):
    assert_rounding_alone(Call(cell, 2, 7, 3, 21, dtype=dtype), "cpu")


@pytest.mark.parametrize("call", [c for c in calls() if "many" not in c.id and "wide" not in c.id])
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_forward_of_one_backend_pairs_with_backward_of_another(call, first, second):
    mixed = both_passes(call, forward(first), backward(second))
    for ours, expected in zip(mixed, in_float64(call), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("shape", ["two directions", "empty sequences", "spare rows"])
def test_forward_passes_opcheck(cell, backend, requires_grad, shape):
    call = Call(cell, projected=2 if cell == "lstm" and shape == "spare rows" else None, **SHAPES[shape])
    torch.library.opcheck(forward(backend), call.arguments(requires_grad))
    if not requires_grad:
        torch.library.opcheck(forward(backend), call.arguments(save=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_passes_opcheck(cell, backend):
    cell, *tensors, save = Call(cell, **SHAPES["ragged both ways"]).arguments()
    y, h_n, c_n, saved = forward(backend)(cell, *tensors, save)
    grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if cell == "lstm" else None]
    torch.library.opcheck(backward(backend), (cell, *grads, *tensors, y, saved))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_without_saved_state_is_refused(backend):
    y = forward(backend)(*Call("gru").arguments(requires_grad=True, save=False))[0]
    with pytest.raises(RuntimeError, match="save=True"):
        y.sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(cell, threads):
    if not HERE.native:
        pytest.skip(HERE.native_missing)
    call = Call(cell, 2, 70, 5, 40, batch_sizes=(70, 64, 33, 9, 2), dtype=torch.float32)
    torch.set_num_threads(1)
    expected = both_passes(call, forward("cpu"), backward("cpu"))
    torch.set_num_threads(threads)
    for _ in range(3):
        for ours, one in zip(both_passes(call, forward("cpu"), backward("cpu")), expected, strict=True):
            assert torch.equal(ours, one)


@pytest.mark.parametrize("cell", CELLS)
def test_every_output_is_written(cell, backend):
    """Outputs are allocated full of NaN; spare rows and empty sequences must be filled as well."""
    call = Call(cell, **SHAPES["spare rows"])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert all(x.isfinite().all() for x in both_passes(call, forward(backend), backward(backend)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_sequence(cell, backend, value):
    call = Call(cell, dtype=torch.float32, hidden=19)
    cell, gates_x, *rest = call.arguments()
    expected = forward(backend)(cell, gates_x, *rest)[0].view(4, 3, -1)
    gates_x[1] = value  # step 0 of sequence 1
    y = forward(backend)(cell, gates_x, *rest)[0].view(4, 3, -1)
    assert torch.equal(y[:, [0, 2]], expected[:, [0, 2]])
    if value != value:
        assert y[:, 1].isnan().all()


BAD = {
    "unknown cell": (0, lambda cell: "gruu", "unknown cell 'gruu'"),
    "gates_x of two dimensions": (1, lambda x: x[:, 0], "gates_x is .rows, directions"),
    "w_hh of another size": (2, lambda x: x[:, :, :-1], r"w_hh is \[1, 15, 5\], got \[1, 15, 4\]"),
    "b_hh of another size": (3, lambda x: x[:, 1:], "b_hh is"),
    "a projection for a GRU": (4, lambda x: torch.zeros(1, 2, 5), "w_hr goes with an LSTM"),
    "h_0 of another size": (5, lambda x: x[:, :, :-1], "h_0 has 4 features"),
    "h_0 of another dtype": (5, lambda x: x.float(), "h_0 has another dtype"),
    "c_0 for a GRU": (6, lambda x: torch.zeros(1, 3, 5), "c_0 goes with an LSTM"),
    "rising batch_sizes": (7, lambda x: torch.tensor([2, 3]), "batch_sizes must not rise"),
    "negative batch_sizes": (7, lambda x: torch.tensor([3, -1]), "batch_sizes must not rise, be negative"),
    "more rows than there are": (7, lambda x: torch.tensor([3] * 5), "add up to 15 rows, but gates_x has 12"),
    "more sequences than there are": (7, lambda x: torch.tensor([4, 4]), "exceed the 3 sequences"),
    "batch_sizes that are no int64": (7, lambda x: torch.tensor([3.0]), "int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_native_operator_refuses(name):
    """Memory safety must not depend on Python."""
    if not HERE.native:
        pytest.skip(HERE.native_missing)
    place, change, message = BAD[name]
    arguments = list(Call("gru").arguments())
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        forward("cpu")(*arguments)
