"""Layers of a stack that run at the same time, as a wavefront over chunks of the steps: in every order that the waits
of their streams allow they give what they do one after the other, and a wait that is left out shows."""

from dataclasses import replace

import pytest
import torch
from cuda_paths import SINGLE_CTA, STEPWISE, THIS_GPU, asked_of, by_path, faulty, path
from gpus import GPUS
from operators import BACKENDS, CELLS, Call, both_passes, forward, nan_in_fresh_memory, to_float64
from operators import backward as backward_of
from torch import Tensor

import seqkernels as sk
from seqkernels import hardware
from seqkernels.backends import call as calls
from seqkernels.backends import costs
from seqkernels.backends.cuda.launch import PassLaunch, cheapest, of_stack
from seqkernels.hardware import THIS_MACHINE

pytestmark = pytest.mark.skipif(
    "cuda" not in BACKENDS, reason="neither a GPU with CUDA kernels nor an emulator, which `make test` builds"
)
EMULATED = pytest.mark.skipif(not THIS_MACHINE.emulator, reason="no emulator here: `make test` builds build/emulator")

PATHS = {"single CTA": SINGLE_CTA}
if THIS_GPU.target == "sm_90":
    PATHS["cluster"] = path("cluster", units=32)
H200 = GPUS["NVIDIA H200"]
STACK = {"layers": 3, "sequences": 9, "steps": 7, "hidden": 40}
SHAPES = {
    "equal chunks": (STACK | {"steps": 6}, 3),
    "a shorter last chunk": (STACK, 3),  # of 3, 3 and 1 steps
    "chunks of one step": (STACK | {"steps": 4}, 9),
    "one step": (STACK | {"steps": 1}, 4),
    "more layers than streams": (STACK | {"layers": 9, "steps": 3}, 2),
    "odd": (STACK | {"hidden": 35, "bias": False}, 2),
}


def in_float64(call: Call) -> list[Tensor]:
    def run(operator):
        return lambda *args: operator(*to_float64(args))

    return both_passes(call, run(forward("torch_eager")), run(backward_of("torch_eager")))


def by_chunks(launch: PassLaunch, chunks: int):
    return by_path(launch._replace(chunks=chunks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", PATHS)
def test_a_wavefront_errs_as_layers_one_after_the_other(name, cell, shape, dtype):
    sizes, chunks = SHAPES[shape]
    call = Call(cell, dtype=dtype, **sizes)
    with nan_in_fresh_memory():
        found = both_passes(call, *by_chunks(PATHS[name], chunks))
    whole = both_passes(call, *by_path(PATHS[name]))
    for ours, one_after_the_other, right in zip(found, whole, in_float64(call), strict=True):
        norm, eps = right.norm().clamp(min=1e-30), torch.finfo(dtype).eps
        errors = [((x.double() - right).norm() / norm).item() for x in (ours, one_after_the_other)]
        assert errors[0] <= 1.25 * errors[1] + 2 * eps


@EMULATED
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_order_of_streams_gives_the_same(cell, emulator):
    call, passes = Call(cell, dtype=torch.float32, **STACK), by_chunks(SINGLE_CTA, 4)
    expected = both_passes(call, *passes)
    for seed in range(6):
        emulator.seed(seed)
        assert all(map(torch.equal, both_passes(call, *passes), expected))


@EMULATED
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("event", [0, 1, 4, 5])
def test_a_wait_that_is_left_out_shows(which, event, emulator):
    """In some of the orders, as what is read too early is NaN."""
    call, passes = Call("gru", dtype=torch.float32, **STACK), by_chunks(SINGLE_CTA, 4)
    expected = both_passes(call, *passes)
    order = ["forward", "backward"]
    faults = list(passes)
    faults[order.index(which)] = faulty(emulator, passes[order.index(which)], "stream", event)

    def shows(seed: int) -> bool:
        emulator.seed(seed)
        return not all(map(torch.equal, both_passes(call, *faults), expected))

    assert any(shows(seed) for seed in range(20))


@EMULATED
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("launch", [0, 4, 8])
def test_a_launch_that_fails_in_the_middle_is_an_error_and_the_next_call_runs(launch, which, emulator):
    call, passes = Call("gru", dtype=torch.float32, **STACK), by_chunks(SINGLE_CTA, 3)
    expected, fails = both_passes(call, *passes), list(passes)
    fails[which] = faulty(emulator, passes[which], "launch", launch)
    with pytest.raises(RuntimeError, match="a CUDA kernel of seqkernels was not started: the launch that was to fail"):
        both_passes(call, *fails)
    assert all(map(torch.equal, both_passes(call, *passes), expected))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_without_what_is_not_given_or_wanted(cell):
    """Inference saves nothing; gradients of final states may be missing, those of x and weights not wanted."""
    call = Call(cell, dtype=torch.float32, **STACK)
    name, *layer = call.arguments()[:6]
    found = []
    for run_forward, run_backward in (by_chunks(SINGLE_CTA, 3), by_path(SINGLE_CTA)):
        inferred = run_forward(name, *layer, False, [], 3)[:3]
        y, h_n, c_n, saved = run_forward(name, *layer, True, [], 3)
        assert all(map(torch.equal, inferred, (y, h_n, c_n)))
        grads = [torch.ones_like(y), None, None]
        results = run_backward(name, *grads, *layer, y, saved, False, False, [], 3)
        more = run_backward(name, None, torch.ones_like(h_n), None, *layer, y, saved, True, True, [], 3)
        found.append([y, h_n, c_n, *results[2:], more[0], *more[1], *more[2:]])
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole)


@EMULATED
def test_what_a_wavefront_launches(emulator):
    """Two launches for a layer and a chunk; backward three more for a layer, and one memory for all of it."""
    call = Call("gru", dtype=torch.float32, **STACK)
    found = asked_of(emulator, call, by_chunks(SINGLE_CTA, 3))
    (forward_sweeps, forward_products), (backward_sweeps, backward_products) = (
        (one["launches"], one["operations"]) for one in found
    )
    gaps = forward_products - 3 * 3
    assert forward_sweeps == 3 * 3 and 0 <= gaps <= 4
    assert backward_sweeps == 3 * 3 + 3 and backward_products == 3 * 3 + 2 * 3


def test_what_cannot_go_as_a_wavefront_is_refused():
    stack = Call("lstm", dtype=torch.float32, **STACK)
    both = replace(stack, directions=2)
    ragged = replace(stack, batch_sizes=(9, 9, 4))
    for call, launch, reason in (
        (both, SINGLE_CTA, "padded layers of one direction"),
        (ragged, SINGLE_CTA, "padded layers of one direction"),
        (stack, STEPWISE, "leave multiprocessors to others"),
        (stack, path("persistent grid", units=32), "leave multiprocessors to others"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            both_passes(call, *by_chunks(launch, 2))


# ---- when it is planned

KERNELBENCH = calls.Call(
    "gru", "cuda", torch.bfloat16, layers=6, together=True, hidden_size=256, input_size=128, sequences=10, steps=512
)


@pytest.mark.parametrize("backward", [False, True])
def test_a_deep_stack_over_many_steps_goes_as_a_wavefront(backward):
    launch, us = of_stack(KERNELBENCH, H200, backward)
    one_by_one = KERNELBENCH.layers * cheapest(KERNELBENCH, H200, backward)[1]
    assert launch.chunks > 1 and us < 0.6 * one_by_one


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 1},
        {"together": False},
        {"steps": 8},
        {"steps": 0},
        {"directions": 2},
        {"layout": "packed"},
        {"layout": "device"},
        {"options": (calls.RESETS,)},
        {"sequences": 4096},  # each layer fills the GPU
        {"hidden_size": 2048},  # step by step
        {"steps": 65536, "hidden_size": 64},  # or any number beyond
    ],
    ids=str,
)
def test_others_go_layer_by_layer(change):
    call = KERNELBENCH._replace(**change)
    for backward in (False, True):
        launch, us = of_stack(call, H200, backward)
        assert launch.chunks == 1
        assert us == pytest.approx(call.layers * cheapest(call, H200, backward)[1])


def test_memory_is_bounded():
    """Backward every layer under way has the gradients of its gates."""
    large = KERNELBENCH._replace(steps=4096, sequences=16)
    assert of_stack(large, H200, False)[0].chunks > 1
    assert of_stack(large, H200, True)[0].chunks == 1


@pytest.mark.parametrize("steps", [32, 64, 128, 256, 1024])
def test_what_is_planned_for_many_steps_pays_for_the_fewest_of_the_same_plan(steps):
    call = KERNELBENCH._replace(steps=steps)
    launch, _ = of_stack(call, H200, False)
    fewest = steps // 2 + 1
    host = call.layers * launch.chunks * costs.HOST_OF_CHUNK
    assert launch.chunks == 1 or host < 0.9 * fewest * call.layers * cheapest(call, H200, False)[1]


@pytest.fixture
def said(monkeypatch):
    """What explain says of a stack on an H200."""
    machine = THIS_MACHINE._replace(cuda_missing="", emulator=True, gpu=H200)
    monkeypatch.setattr(hardware, "machine_of", lambda device: machine)

    def explained(steps: int = 512, change=lambda rnn: None, **options) -> str:
        rnn = sk.GRU(128, 256, num_layers=6, dtype=torch.bfloat16, device="cpu", **options)
        rnn.backend = "cuda"
        change(rnn)
        return sk.explain(rnn, torch.zeros(steps, 10, 128, dtype=torch.bfloat16, device="cpu")).kernel

    return explained


def test_explain_says_so(said):
    assert "layers as a wavefront of" in said()
    assert "wavefront" not in said(steps=4)


def test_layers_that_are_calls_of_their_own_are_none(said):
    assert "wavefront" not in said(dropout=0.5)
    assert "layers as a wavefront of" in said(change=lambda rnn: rnn.eval(), dropout=0.5)
    assert "wavefront" not in said(recompute=True)
    assert "wavefront" not in said(return_all_states=True)
    frozen = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    assert "wavefront" not in said(change=lambda rnn: [getattr(rnn, name).requires_grad_(False) for name in frozen])
