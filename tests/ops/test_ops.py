"""The operator pair on every backend and instruction set. Runs under the sanitizers as well."""

import pytest
import torch
from operators import (
    BACKENDS,
    BELOW_FLOAT64,
    CELLS,
    NO_CPU_KERNELS,
    PAIRS,
    SHAPES,
    SLOW_MARKED,
    Call,
    assert_an_infinite_last_state_is_no_factor,
    assert_as_in_float64,
    assert_rounding_alone,
    backward,
    both_passes,
    calls,
    for_backends,
    forward,
    layer_by_layer,
    nan_in_fresh_memory,
    recompute,
)
from torch import Tensor

from seqkernels import late_checks
from seqkernels.backends.stack import SavedLayout
from seqkernels.hardware import THIS_MACHINE


@pytest.mark.parametrize("call", calls())
def test_every_instruction_set_gives_what_torch_eager_gives(call, instruction_set):
    assert_as_in_float64(both_passes(call, forward("cpu"), backward("cpu")), call)


@BELOW_FLOAT64
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_below_float64_err_by_their_rounding_alone(cell, dtype, backend):
    assert_rounding_alone(Call(cell, 2, 5, 6, 37, batch_sizes=(5, 5, 3, 2, 2, 1), dtype=dtype), backend)


@BELOW_FLOAT64
@pytest.mark.parametrize("cell", CELLS)
def test_every_instruction_set_errs_by_rounding_alone_in_dtypes_below_float64(cell, dtype, instruction_set):
    assert_rounding_alone(Call(cell, 2, 7, 3, 21, dtype=dtype), "cpu")


@pytest.mark.parametrize("call", [c for c in calls() if not any(size in c.id for size in ("many", "deep", "long"))])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_forward_of_one_backend_pairs_with_backward_of_another(call, first, second):
    call = for_backends(call, first, second)
    assert_as_in_float64(both_passes(call, forward(first), backward(second)), call)


STACKS = {
    "padded": {"layers": 2},
    "three layers both ways": {"layers": 3, "directions": 2, "hidden": 8},
    "four ragged layers": {"layers": 4, **SHAPES["ragged"]},
    "spare rows": {"layers": 2, **SHAPES["spare rows"]},
    "steps in which nothing runs": {"layers": 3, **SHAPES["steps in which nothing runs"]},
    "all sequences empty": {"layers": 2, **SHAPES["all sequences empty"]},
    "no steps": {"layers": 2, **SHAPES["no steps"]},
    "no sequences": {"layers": 2, **SHAPES["no sequences"]},
    "no bias": {"layers": 2, "bias": False},
}


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stack_is_its_layers_one_after_another(backend, cell, shape):
    for projected in (None, 3) if cell == "lstm" else (None,):
        call = for_backends(Call(cell, projected=projected, **STACKS[shape]), backend)
        with nan_in_fresh_memory():
            ours = both_passes(call, forward(backend), backward(backend))
            expected = layer_by_layer(call, forward(backend), backward(backend))
        cell, x, weights, h_0, *_ = call.arguments()
        blocks, ys = SavedLayout.of(cell, x, weights, h_0, call.layers).parts(ours.pop(3))
        assert all(part.isfinite().all() for part in (*blocks, *ys))
        for found, right in zip(ours, expected, strict=True):
            assert torch.equal(found, right)
        without = forward(backend)(*call.arguments(save=False))
        assert without[3].numel() == 0
        for found, right in zip(without[:3], expected[:3], strict=True):
            assert torch.equal(found, right)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_stacks_of_one_backend_pair_with_those_of_another(first, second):
    for cell in CELLS:
        call = for_backends(Call(cell, **STACKS["three layers both ways"]), first, second)
        assert_as_in_float64(both_passes(call, forward(first), backward(second)), call)


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_stacks_pass_opcheck(cell, backend):
    call = for_backends(Call(cell, layers=2, **SHAPES["ragged both ways"]), backend)
    torch.library.opcheck(forward(backend), call.arguments(requires_grad=True))
    cell, *stack, save, launch, layers = call.arguments()
    y, h_n, c_n, saved = forward(backend)(cell, *stack, save, launch, layers)
    grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if cell == "lstm" else None]
    torch.library.opcheck(backward(backend), (cell, *grads, *stack, y, saved, True, True, launch, layers))


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("shape", ["two directions", "empty sequences", "spare rows"])
def test_forward_passes_opcheck(cell, backend, requires_grad, shape):
    call = Call(cell, projected=2 if cell == "lstm" and shape == "spare rows" else None, **SHAPES[shape])
    call = for_backends(call, backend)
    torch.library.opcheck(forward(backend), call.arguments(requires_grad))
    if not requires_grad:
        torch.library.opcheck(forward(backend), call.arguments(save=False))


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_passes_opcheck(cell, backend):
    cell, *layer, save = for_backends(Call(cell, **SHAPES["ragged both ways"]), backend).arguments()
    y, h_n, c_n, saved = forward(backend)(cell, *layer, save)
    grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if cell == "lstm" else None]
    for wants in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward(backend), (cell, *grads, *layer, y, saved, *wants))


def test_backends_have_one_schema():
    """Those of the CPU's kernels stand in csrc/cpu, for programs without Python; the others' in Python, for installs
    without that library."""
    recurrence = ("recurrence_forward", "recurrence_backward", "recurrence_recompute")
    for name in (*recurrence, "masked_forward", "masked_backward", "layer_norm_forward", "layer_norm_backward"):
        packet = getattr(torch.ops.seqkernels, name)
        schemas = {str(getattr(packet, each)._schema).replace(f".{each}(", "(") for each in packet.overloads()}
        assert len(schemas) == 1


@pytest.mark.parametrize("backend", SLOW_MARKED)
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_passes_opcheck(cell, backend):
    for shape, layers in (("ragged both ways", 1), ("padded", 2)):
        arguments = for_backends(Call(cell, layers=layers, **SHAPES[shape]), backend).arguments()
        cell, *layer, save = arguments[:7]
        y, h_n, c_n, _ = forward(backend)(cell, *layer, save, *arguments[7:])
        grads = [torch.ones_like(y), torch.ones_like(h_n), torch.ones_like(c_n) if cell == "lstm" else None]
        torch.library.opcheck(recompute(backend), (cell, *grads, *layer, True, True, *arguments[7:]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_without_saved_state_computes_it_again(backend, cell):
    found = []
    # A step in Triton's interpreter takes as long as all of these.
    stack = {"layers": 2, "steps": 2} if backend == "triton" else STACKS["three layers both ways"]
    for save in (True, False):
        call = for_backends(Call(cell, **stack), backend)
        _, x, weights, h_0, c_0, *_ = arguments = call.arguments(requires_grad=True, save=save)
        y, h_n, c_n, _ = forward(backend)(*arguments)
        inputs = [x, *weights, h_0, *([] if c_0 is None else [c_0])]
        loss = (y.sin().sum() + h_n.cos().sum() + c_n.sum()) if c_0 is not None else y.sin().sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        again = torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)
        found.append([y, h_n, *grads, *again])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(cell, threads):
    if NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    calls = [
        Call(cell, 2, 70, 5, 60, batch_sizes=(70, 64, 33, 9, 2), dtype=torch.float32),
        Call(cell, 1, 2, 40, 150, batch_sizes=(2,) * 30 + (1,) * 10, dtype=torch.float32),
        Call(cell, 2, 1, 1, 700, input=200, dtype=torch.float32),
        Call(cell, 1, 40, 1, 300, input=200, dtype=torch.float32),
    ]
    for call in calls:
        torch.set_num_threads(1)
        expected = both_passes(call, forward("cpu"), backward("cpu"))
        torch.set_num_threads(threads)
        for _ in range(3):
            for ours, one in zip(both_passes(call, forward("cpu"), backward("cpu")), expected, strict=True):
                assert torch.equal(ours, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_read_before_it_is_written(cell, shape, dtype):
    """Outputs and working memory start as NaN; spare rows and empty sequences must be filled as well."""
    if NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    with nan_in_fresh_memory():
        results = both_passes(Call(cell, dtype=dtype, **SHAPES[shape]), forward("cpu"), backward("cpu"))
    assert all(x.isfinite().all() for x in results)


def test_working_memory_can_be_given_back():
    if NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    from seqkernels import _C

    call = Call("gru", **SHAPES["ragged"])
    before = both_passes(call, forward("cpu"), backward("cpu"))
    _C.release_memory()
    _C.release_memory()
    after = both_passes(call, forward("cpu"), backward("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_stay_in_their_sequence(cell, backend, value):
    call = Call(cell, dtype=torch.float32, hidden=19)
    cell, x, *rest = call.arguments()
    expected = forward(backend)(cell, x, *rest)[0].view(4, 3, -1)
    x[1] = value  # step 0 of sequence 1
    y = forward(backend)(cell, x, *rest)[0].view(4, 3, -1)
    assert torch.equal(y[:, [0, 2]], expected[:, [0, 2]])
    if value != value:
        assert y[:, 1].isnan().all()


def but(k: int, change):
    """Change weight k."""
    return lambda weights: [change(w) if i == k else w for i, w in enumerate(weights)]


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_sight", [True, False])
def test_what_no_step_uses_is_never_read(cell, backend, projected, in_sight, monkeypatch, request):
    """Rows behind the last step, and states of sequences that never run, may hold NaN."""
    if not in_sight:
        if backend not in ("cuda", "triton"):
            pytest.skip(f"{backend} reads batch_sizes")
        monkeypatch.setattr(late_checks, "out_of_sight", lambda values: True)
        if backend == "cuda" and THIS_MACHINE.emulator:
            request.getfixturevalue("sizes_on_gpu")
    if projected and cell != "lstm":
        pytest.skip("only an LSTM is projected")
    call = Call(cell, 2, 4, batch_sizes=(2, 1), spare_rows=3, projected=2 if projected else None, dtype=torch.float32)

    def results(*values: float) -> list[Tensor]:
        cell, x, weights, h_0, c_0, batch_sizes, save = call.arguments()
        for value, unused in zip(values, (x[3:], h_0[:, 2:], None if c_0 is None else c_0[:, 2:]), strict=True):
            if unused is not None:
                unused.fill_(value)
        layer = x, weights, h_0, c_0, batch_sizes
        y, h_n, c_n, saved = forward(backend)(cell, *layer, save)
        grad_c_n = None if c_0 is None else torch.ones_like(c_n)
        grads = torch.ones_like(y), torch.ones_like(h_n), grad_c_n
        grad_x, grad_weights, *_ = backward(backend)(cell, *grads, *layer, y, saved, True, True)
        return [y, grad_x, *grad_weights]

    nan = float("nan")
    for found, expected in zip(results(nan, nan, nan), results(0, 0, 0), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_last_state_is_no_factor_of_a_weight_gradient(backend):
    assert_an_infinite_last_state_is_no_factor(forward(backend), backward(backend))


BAD = {
    "unknown cell": (0, lambda cell: "gruu", "unknown cell 'gruu'"),
    "x of three dimensions": (1, lambda x: x[None], "x is .rows, input size., got 3 dimensions"),
    "x of another size": (1, lambda x: x[:, 1:], r"w_ih is \[15, 2\], got \[15, 3\]"),
    "w_ih of one dimension": (2, but(0, lambda w: w[0]), "w_ih is .gates . hidden size, input size."),
    "w_ih of no whole gates": (2, but(0, lambda w: w[1:]), "14 rows, no multiple of 3 gates"),
    "w_hh of another size": (2, but(1, lambda w: w[:, :-1]), r"w_hh is \[15, 5\], got \[15, 4\]"),
    "b_hh of another size": (2, but(3, lambda b: b[1:]), "b_hh is"),
    "a projection for a GRU": (2, lambda weights: [*weights, torch.zeros(2, 5)], "w_hr goes with an LSTM"),
    "too few weights": (2, lambda weights: weights[:1], "got 1 weights for 1 directions"),
    "h_0 of another size": (3, lambda x: x[:, :, :-1], "h_0 has 4 features"),
    "h_0 of another dtype": (3, lambda x: x.bfloat16(), "h_0 has another dtype"),
    "c_0 for a GRU": (4, lambda x: torch.zeros(1, 3, 5), "c_0 goes with an LSTM"),
    "rising batch_sizes": (5, lambda x: torch.tensor([2, 3]), "batch_sizes must not rise"),
    "negative batch_sizes": (5, lambda x: torch.tensor([3, -1]), "batch_sizes must not rise, be negative"),
    "more rows than there are": (
        5,
        lambda x: torch.tensor([3] * 5),
        "add up to (15 rows, but x has|more rows than x has,) 12",
    ),
    "more sequences than there are": (5, lambda x: torch.tensor([4, 4]), "exceed the 3 sequences"),
    "batch_sizes that are no int64": (5, lambda x: torch.tensor([3.0]), "int64"),
}


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch_eager"])
@pytest.mark.parametrize("name", BAD)
def test_an_operator_that_addresses_memory_refuses(name, backend, monkeypatch):
    """Memory safety must not depend on the modules."""
    monkeypatch.setenv("SEQKERNELS_CHECK", "1")
    place, change, message = BAD[name]
    arguments = list(for_backends(Call("gru"), backend).arguments())
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        forward(backend)(*arguments)


BAD_STACKS = {
    "no layers": (8, lambda layers: 0, "h_0 has 4 states for 0 layers"),
    "layers that do not divide the states": (8, lambda layers: 3, "h_0 has 4 states for 3 layers"),
    "one layer too few": (8, lambda layers: 1, "one or two directions, got 4"),
    "a second w_ih of the input's size": (2, but(8, lambda w: w[:, :3]), r"w_ih is \[15, 10\], got \[15, 3\]"),
    "too few weights": (2, lambda weights: weights[:-1], "got 15 weights for 4 directions"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD_STACKS)
def test_a_stack_that_does_not_fit_is_refused(name, backend):
    place, change, message = BAD_STACKS[name]
    arguments = list(for_backends(Call("gru", 2, layers=2), backend).arguments())
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message):
        forward(backend)(*arguments)


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton here")
def test_triton_has_no_kernels_for_float64():
    with pytest.raises(RuntimeError, match="the kernels compute in float32"):
        forward("triton")(*Call("gru", batch_sizes=(3, 2)).arguments())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_without_data_is_no_reason_to_compute_nothing(backend):
    """torch dispatches a call with a tensor on the meta device to the fake kernel, whose results are empty memory."""
    _, x, weights, h_0, c_0, batch_sizes, _ = Call("lstm", batch_sizes=(3, 2), dtype=torch.float32).arguments()
    y, _, _, saved = forward(backend)("lstm", x, weights, h_0, c_0, batch_sizes, True)
    layer = [x, *weights, h_0, c_0, batch_sizes]

    def run(layer, grad_y=y, y=y) -> None:
        x, *weights, h_0, c_0, batch_sizes = layer
        forward(backend)("lstm", x, weights, h_0, c_0, batch_sizes, True)
        backward(backend)("lstm", grad_y, None, None, x, weights, h_0, c_0, batch_sizes, y, saved, True, True)

    run(layer)
    for k, tensor in enumerate(layer):
        with pytest.raises(RuntimeError, match=r"on one device|where x is"):
            run([*layer[:k], tensor.to("meta"), *layer[k + 1 :]])
    for other in ({"grad_y": y.to("meta")}, {"y": y.to("meta")}):
        with pytest.raises(RuntimeError, match="on one device"):
            run(layer, **other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_a_state_that_a_cell_does_not_have_is_refused(backend):
    _, x, weights, h_0, _, _, _ = Call("gru", dtype=torch.float32).arguments()
    y, h_n, _, saved = forward(backend)("gru", x, weights, h_0, None, None, True)
    with pytest.raises(RuntimeError, match="grad_c_n"):
        backward(backend)("gru", y, h_n, h_n, x, weights, h_0, None, None, y, saved, True, True)


@pytest.mark.parametrize("backend", [name for name in ("cuda", "triton") if name not in BACKENDS])
def test_an_operator_whose_kernels_are_not_here_says_so(backend):
    cell, x, weights, *rest = Call("gru", dtype=torch.float32).arguments()
    with pytest.raises(RuntimeError, match=r"no CUDA kernels|CUDA|Triton's kernels take tensors on a GPU"):
        forward(backend)(cell, x, weights, *rest)
