"""The CUDA kernels, every path, cell and dtype: on a GPU, or run on the CPU, there in random orders of threads and
blocks; and the checks of that run themselves, by planted faults."""

from dataclasses import replace

import pytest
import torch
from cases import WITH_RELU
from cuda_paths import SINGLE_CTA, STEPWISE, THIS_GPU, by_path, faulty, path
from operators import (
    BACKENDS,
    CELLS,
    SHAPES,
    Call,
    assert_an_infinite_last_state_is_no_factor,
    assert_rounding_alone_of,
    backward,
    both_passes,
    forward,
)

from seqkernels import hardware
from seqkernels.backends import call as calls
from seqkernels.backends import cells
from seqkernels.backends.cuda.launch import PassLaunch, launch_of

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS, reason="neither a GPU with CUDA kernels nor an emulator, which `make test` builds"
)

PATHS = {
    "single CTA": SINGLE_CTA,
    "single CTA of 2": SINGLE_CTA._replace(tile=2),
    "stepwise": STEPWISE,
}
if THIS_GPU.target == "sm_90":
    PATHS |= {"cluster": path("cluster", units=32), "persistent grid": path("persistent grid", units=32)}
ONE_LAUNCH = {name: path for name, path in PATHS.items() if name != "stepwise"}
# Of layers whose shape does not say: so many that several blocks share them, the last of which has less to do.
HIDDEN = {"cluster": 70, "persistent grid": 70}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("many rows", "deep", "long")])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", PATHS)
def test_every_path_errs_by_rounding_alone(name, cell, shape, dtype):
    call = Call(cell, dtype=dtype, **{"hidden": HIDDEN.get(name, 5), **SHAPES[shape]})
    single_cta = {torch.float32: 128, torch.float64: 0}.get(dtype, 256)
    several_blocks = 0 if dtype == torch.float64 else 512
    widest = {"cluster": several_blocks, "persistent grid": several_blocks, "stepwise": 1 << 30}.get(name, single_cta)
    if call.hidden > widest:
        pytest.skip("there is no such kernel for it")
    if name == "cluster" and call.hidden <= 32:
        pytest.skip("a cluster has at least two blocks, of 32 hidden units here")
    assert_rounding_alone_of(call, *by_path(PATHS[name]))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    "shape", ["ragged", "ragged both ways", "empty sequences", "steps in which nothing runs", "spare rows"]
)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", PATHS)
def test_sizes_that_only_the_gpu_knows(name, cell, shape, projected, sizes_on_gpu):
    if projected and (cell, name) != ("lstm", "stepwise"):
        pytest.skip("only an LSTM is projected, and only step by step")
    hidden = HIDDEN.get(name, 5)
    call = Call(cell, projected=2 if projected else None, hidden=hidden, dtype=torch.float32, **SHAPES[shape])
    assert_rounding_alone_of(call, *by_path(PATHS[name]))


def test_an_infinite_last_state_is_no_factor_of_a_weight_gradient(sizes_on_gpu):
    """That of test_ops, where the host does not know which rows no step uses."""
    assert_an_infinite_last_state_is_no_factor(*by_path(STEPWISE))


@pytest.mark.parametrize("hidden", [33, 65, 70, 128])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_infinity_reaches_what_it_does_step_by_step(name, cell, hidden):
    """And not, as NaN, all others by units that a kernel has beyond those of the layer."""

    def results(path, h_0, weight, grad):
        _, x, weights, _, c_0, *rest = Call(cell, 1, 2, 4, hidden, dtype=torch.float16).arguments()
        layer = torch.zeros_like(x), [torch.full_like(w, weight * (i == 1)) for i, w in enumerate(weights)]
        states = x.new_full((1, 2, hidden), h_0), None if c_0 is None else torch.full_like(c_0, 0.5)
        forward, back = by_path(path)
        y, h_n, c_n, saved = forward(cell, *layer, *states, *rest)
        grads = torch.zeros_like(y), torch.full_like(h_n, grad), None if c_0 is None else torch.zeros_like(c_n)
        grad_x, grad_weights, *grad_states = back(cell, *grads, *layer, *states, None, y, saved, True, True)
        # No more than where infinity and NaN are.
        return [x.where(~x.isfinite(), 0) for x in (y, h_n, c_n, saved, grad_x, *grad_weights, *grad_states)]

    # A product beyond float16's range is infinite step by step alone, where it is rounded. Bounded gates do not show
    # that, but a candidate by relu that another gate weighs does.
    weighed = cell in WITH_RELU and cells.CELLS[cell].gates > 1
    beyond_range = [] if weighed else [(30000, 1, 1)]
    for h_0, weight, grad in (*beyond_range, (float("inf"), 1, 1), (0.5, 2**-10, float("inf"))):
        found, expected = (results(one, h_0, weight, grad) for one in (ONE_LAUNCH[name], STEPWISE))
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("hidden", [31, 64, 65, 90, 100, 127, 128, 130, 192, 201, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_width_of_a_single_cta(cell, dtype, hidden):
    if hidden > 128 and dtype == torch.float32:
        pytest.skip("there is no single CTA kernel for it")
    call = Call(cell, 2, 9, 3, hidden, batch_sizes=(9, 5, 1), bias=False, dtype=dtype)
    assert_rounding_alone_of(call, *by_path(SINGLE_CTA))


@pytest.mark.parametrize(
    ("hidden", "dtype"), [(128, torch.float32), (127, torch.float32), (256, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("cell", CELLS)
def test_where_the_weights_lie_changes_no_bit(cell, hidden, dtype, shared_memory):
    """With less shared memory a block reads more of the weights from global memory in each step."""
    call, found = Call(cell, 1, 3, 2, hidden, dtype=dtype), []
    for bytes_of_a_block in (THIS_GPU.shared_memory, 99 << 10, 80 << 10, 68 << 10):
        shared_memory(bytes_of_a_block)
        found.append(both_passes(call, *by_path(SINGLE_CTA)))
    first, *others = found
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("hidden", [90, 127, 128])
@pytest.mark.parametrize("cell", ["ligru", "gru", "lstm"])
def test_a_block_with_one_sequence_has_more_weights_in_registers_and_gives_the_same_bits(cell, hidden, shared_memory):
    call = Call(cell, 2, 2, 3, hidden, batch_sizes=(2, 2, 1), dtype=torch.float32)
    expected = both_passes(call, *by_path(SINGLE_CTA))
    for bytes_of_a_block in (THIS_GPU.shared_memory, 68 << 10):
        shared_memory(bytes_of_a_block)
        found = both_passes(call, *by_path(SINGLE_CTA._replace(tile=1)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Saturated(Call):
    """Of an LSTM: gates are what their biases make them, f so near 1 that c has a memory of a thousand steps, in which
    it grows until tanh is 1."""

    def arguments(self, *args, **more) -> tuple:
        cell, x, weights, *rest = super().arguments(*args, **more)
        biases = torch.tensor([-4, 7, 1, -6 if self.seed else 2]).repeat_interleave(self.hidden).to(weights[2])
        zeros = [torch.zeros_like(w) for w in weights]
        return cell, torch.zeros_like(x), [zeros[0], zeros[1], biases, zeros[3]], *rest


@pytest.mark.parametrize("seed", [0, 1], ids=["o near 1", "o near 0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_gates_near_0_and_1_err_by_rounding_alone_for_many_steps(name, dtype, seed):
    hidden = 34 if name in HIDDEN else 4
    call = Saturated("lstm", 1, 2, 400, hidden, dtype=dtype, seed=seed)
    assert_rounding_alone_of(call, *by_path(ONE_LAUNCH[name]))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_how_many_sequences_a_block_takes_changes_no_bit(name, cell):
    """Exact float32 multiplies for 1, 2, 4 or 8 of them, in each step for no more than run in it."""
    call = Call(cell, 1, 8, 8, 40, batch_sizes=(8, 7, 6, 5, 4, 3, 2, 1), dtype=torch.float32)
    first, *others = (both_passes(call, *by_path(ONE_LAUNCH[name]._replace(tile=tile))) for tile in (8, 4, 3, 2, 1))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_at_any_address(name, dtype):
    """Kernels read two units at once, whose address need not be a multiple of both."""

    def shifted(x):
        if isinstance(x, list):
            return [shifted(one) for one in x]
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    call = Call("lstm", 2, 3, 4, 40, batch_sizes=(3, 3, 2, 1), dtype=dtype)
    forward, back = by_path(PATHS[name])
    expected = both_passes(call, forward, back)
    found = both_passes(call, lambda *args: forward(*map(shifted, args)), lambda *args: back(*map(shifted, args)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_more_steps_than_a_grid_may_have_rows():
    """65,535 is what cuDNN takes. A run that is cut there and carried on gives the same bits."""
    cell, x, weights, h_0, *rest = Call("gru", 1, 1, 66000, 3, 1, dtype=torch.float32).arguments()
    forward, _ = by_path(PATHS["stepwise"])
    y, h_n, *_ = forward(cell, x, weights, h_0, *rest)
    before, carried, *_ = forward(cell, x[:65535], weights, h_0, *rest)
    after, end, *_ = forward(cell, x[65535:], weights, carried, *rest)
    assert torch.equal(y, torch.cat([before, after])) and torch.equal(h_n, end)


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_follows_torchs_switch(cell, monkeypatch):
    call = Call(cell, 2, 5, 4, 40, dtype=torch.float32)
    for allowed in (False, True):
        monkeypatch.setattr(hardware, "tf32", lambda device, allowed=allowed: allowed)
        layer = calls.Call(
            cell, "cuda", call.dtype, hidden_size=call.hidden, tf32=allowed, directions=2, sequences=call.sequences
        )
        plan = launch_of(layer, THIS_GPU)
        runs = by_path(plan.forward, allowed)[0], by_path(plan.backward, allowed)[1]
        found = both_passes(call, forward("cuda"), backward("cuda"))
        for ours, expected in zip(found, both_passes(call, *runs), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_rounds_factors_to_ten_bits(cell, name):
    call = Call(cell, 2, 5, 4, 70, dtype=torch.float32)
    exact, rounded = (both_passes(call, *by_path(PATHS[name], tf32)) for tf32 in (False, True))
    # A relu input that rounds across zero has another gradient, which is no error.
    compared = slice(2) if cell == "rnn_relu" else slice(None)
    pairs = zip(rounded[compared], exact[compared], strict=True)
    gaps = [float((a - b).norm() / b.norm()) for a, b in pairs if b.numel()]
    assert 1e-5 < max(gaps) < 3e-3


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("cell", CELLS)
def test_no_order_of_threads_changes_a_bit(cell, name, emulator):
    call = Call(cell, 2, 11, 4, 33, batch_sizes=(11, 9, 9, 2), dtype=torch.float32)
    expected = both_passes(call, *by_path(PATHS[name]))
    for seed in range(5):
        emulator.seed(seed)
        for ours, first in zip(both_passes(call, *by_path(PATHS[name])), expected, strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("backward", "barrier"),
    [(False, 0), (False, 2), (True, 1)],
    ids=["before the first step", "a step forward", "a step backward"],
)
@pytest.mark.parametrize(("sequences", "dtype"), [(3, torch.float32), (7, torch.bfloat16)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_missing_barrier_is_caught(cell, sequences, dtype, backward, barrier, seed, emulator):
    """A lane has one of 3 sequences, or two of 7."""
    call = Call(cell, 1, sequences, 4, 40, dtype=dtype)
    forward, back = by_path(SINGLE_CTA)
    emulator.seed(seed)
    passes = (
        (forward, faulty(emulator, back, "barrier", barrier))
        if backward
        else (faulty(emulator, forward, "barrier", barrier), back)
    )
    with pytest.raises(RuntimeError, match=r"race|unwritten"):
        both_passes(call, *passes)
    both_passes(call, forward, back)


def test_dtypes_and_sizes_without_a_kernel_say_so():
    too_large = (129, torch.float32), (257, torch.bfloat16)
    for call in (Call("gru", dtype=torch.float64), *(Call("gru", hidden=h, dtype=dtype) for h, dtype in too_large)):
        with pytest.raises(RuntimeError, match="no single CTA kernel"):
            both_passes(replace(call), *by_path(SINGLE_CTA))


@pytest.mark.parametrize("cell", CELLS)
def test_a_block_takes_no_more_shared_memory_than_there_is(cell, shared_memory, emulator):
    """And a single CTA all that its weights can be in; without space for one group of them it is refused."""
    call = Call(cell, 1, 1, 1, 128, dtype=torch.float32)
    before = emulator.counts()["shared_bytes"]
    shared_memory(68 << 10)
    both_passes(call, *by_path(SINGLE_CTA))
    taken = (emulator.counts()["shared_bytes"] - before) / 2
    assert (32 << 10) < taken <= (68 << 10) or cell.startswith("rnn")
    shared_memory(8 << 10)
    with pytest.raises(RuntimeError, match="bytes of shared memory, and may have 8192"):
        both_passes(call, *by_path(SINGLE_CTA))


def test_plans_that_nothing_can_run_are_refused():
    call = Call("gru", dtype=torch.float32)
    for launch, reason in (
        (PassLaunch(9, 8, 0), "unknown path 9"),
        (SINGLE_CTA._replace(tile=9), "takes 1 to 8 sequences, got 9"),
        (SINGLE_CTA._replace(units=32), "no kernel for a single CTA with 32 units"),
        (SINGLE_CTA._replace(chunks=0), "one chunk or more, got 0"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            both_passes(call, *by_path(launch))
