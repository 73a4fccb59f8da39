"""Lengths, cu_seqlens and batch_sizes on a GPU that do not fit: no kernel leaves the tensors, and a later call raises.
On the CPU as well, where tensors count as out of sight."""

import pytest
import torch
from cuda_paths import SINGLE_CTA, STEPWISE, THIS_GPU, path
from operators import BACKENDS, Call, backward, forward

import seqkernels as sk
from seqkernels import late_checks
from seqkernels.backends.cuda.launch import Launch
from seqkernels.backends.triton import layer as triton


@pytest.fixture(autouse=True)
def out_of_sight(monkeypatch):
    monkeypatch.setattr(late_checks, "out_of_sight", lambda values: True)
    monkeypatch.delenv("SEQKERNELS_CHECK", raising=False)
    late_checks._notes.clear()
    yield
    late_checks._notes.clear()


def finish() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


BAD_LENGTHS = {
    "negative": ([3, -1, 2], [3, 0, 2]),
    "too long": ([3, 7, 2], [3, 6, 2]),
    "all": ([-(1 << 40), 1 << 40, 7], [0, 6, 6]),
}


def run_lengths(lengths: list[int]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rnn, x = sk.GRU(4, 5, 2, bidirectional=True), torch.randn(6, 3, 4, requires_grad=True)
    y, h_n = rnn(x, lengths=torch.tensor(lengths))
    (y.sum() + h_n.sum()).backward()
    return [y, h_n, x.grad, *(p.grad for p in rnn.parameters())]


@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_lengths_are_taken_as_the_nearest_that_fit_and_the_next_call_says_so(bad):
    given, nearest = BAD_LENGTHS[bad]
    found = run_lengths(given)
    finish()
    with pytest.raises(ValueError, match="between 0 and the 6 steps of the input"):
        run_lengths(nearest)
    assert all(map(torch.equal, found, run_lengths(nearest)))  # and once only


@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_a_call_that_waits_says_so_itself(bad, monkeypatch):
    given, nearest = BAD_LENGTHS[bad]
    monkeypatch.setenv("SEQKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"between 0 and the 6 steps of the input, got \["):
        run_lengths(given)
    assert all(x.isfinite().all() for x in run_lengths(nearest))


BAD_CU_SEQLENS = ([0, 4, 3, 6], [1, 4, 6], [0, 4, 5], [0, 4, 9], [-5, 1 << 40, 2], [0, 1 << 40])


@pytest.mark.parametrize("max_seqlen", [None, 3])
@pytest.mark.parametrize("bad", BAD_CU_SEQLENS, ids=str)
def test_cu_seqlens_that_do_not_fit_leave_the_rows_alone(bad, max_seqlen, monkeypatch):
    weights, x = sk.GRU(4, 5)._flat_weights, torch.randn(6, 4, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(late_checks, "look", lambda: None)  # which may see it within the call
        y, h_n = sk.functional.gru(x, None, weights, cu_seqlens=torch.tensor(bad), max_seqlen=max_seqlen)
        y.sum().backward()
    assert y.isfinite().all() and h_n.isfinite().all() and x.grad.isfinite().all()
    finish()
    with pytest.raises(ValueError, match=r"start at 0, never fall, and end at the number of rows of the input, 6"):
        sk.GRU(4, 5)(torch.randn(6, 3, 4))
    sk.GRU(4, 5)(torch.randn(6, 3, 4))


def test_a_sequence_longer_than_max_seqlen_is_cut_and_told():
    weights = sk.GRU(4, 5)._flat_weights
    sk.functional.gru(torch.randn(6, 4), None, weights, cu_seqlens=torch.tensor([0, 4, 6]), max_seqlen=3)
    finish()
    with pytest.raises(ValueError, match="between 0 and the 3 steps"):
        sk.GRU(4, 5)(torch.randn(6, 3, 4))


def test_compiled_code_says_so_as_well():
    rnn, x = sk.GRU(4, 5), torch.randn(6, 3, 4)
    compiled = torch.compile(lambda x, lengths: rnn(x, lengths=lengths)[0], backend="aot_eager", fullgraph=True)
    found = compiled(x, torch.tensor([3, 7, 2]))
    finish()
    with pytest.raises(ValueError, match="between 0 and the 6 steps"):
        compiled(x, torch.tensor([3, 6, 2]))
    assert torch.equal(found, compiled(x, torch.tensor([3, 6, 2])))


# Of 3 sequences and 6 rows, and what they are taken as.
BAD_SIZES = {
    "rising": ([1, 3, 2], [1, 1, 1], "must not rise"),
    "negative": ([3, -1, 2], [3, 0, 0], "must not rise, be negative"),
    "more sequences than there are": ([4, 2, 1], [3, 2, 1], "exceed the 3 sequences"),
    "more rows than there are": ([3, 3, 3], [3, 3, 0], "more rows than x has, 6"),
    "a step that begins behind the rows": ([2, 2, 2, 2], [2, 2, 2, 0], "more rows than x has, 6"),
    "far off": ([1 << 62, 1 << 62, -(1 << 62)], [3, 3, 0], "exceed the 3 sequences"),
}
CUDA_PATHS = {"single CTA": SINGLE_CTA, "stepwise": STEPWISE}
if THIS_GPU.target == "sm_90":
    CUDA_PATHS |= {"cluster": path("cluster", units=32), "persistent grid": path("persistent grid", units=32)}
WAYS = [("cuda", name) for name in CUDA_PATHS] + [("triton", "resident"), ("triton", "stepwise")]


@pytest.mark.parametrize("bad", BAD_SIZES)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(("backend", "name"), WAYS)
def test_batch_sizes_that_do_not_fit_never_lead_out_of_the_tensors(backend, name, cell, bad, monkeypatch, request):
    """In the emulator, which checks every access; on a GPU, compute-sanitizer does."""
    if backend not in BACKENDS:
        pytest.skip(f"no backend {backend} here")
    launch: list[int] = []
    if backend == "cuda":
        if torch.get_default_device().type == "cpu":
            request.getfixturevalue("sizes_on_gpu")
        one = CUDA_PATHS[name]
        launch = list(Launch(False, one, one).to_ints())
    elif name == "stepwise":
        monkeypatch.setattr(triton, "launch_of", lambda call, gpu: triton.Launch(call.tf32, False, 4, 128, 4))
    given, taken_as, message = BAD_SIZES[bad]
    hidden = 70 if name in ("cluster", "persistent grid") else 5
    call = Call(cell, 2, 3, hidden=hidden, batch_sizes=(2, 2, 1), spare_rows=1, dtype=torch.float32)

    def run(sizes: list[int]) -> list[torch.Tensor]:
        cell, x, weights, h_0, c_0, _, save = call.arguments()
        layer = x, weights, h_0, c_0, torch.tensor(sizes)
        y, h_n, c_n, saved = forward(backend)(cell, *layer, save, launch)
        if sizes is given:
            told(message)
        grads = torch.ones_like(y), torch.ones_like(h_n), None if c_0 is None else torch.ones_like(c_n)
        grad_x, grad_weights, *grad_states = backward(backend)(cell, *grads, *layer, y, saved, True, True, launch)
        if sizes is given:
            told(message)
        return [y, h_n, c_n, grad_x, *grad_weights, *grad_states]

    for found, expected in zip(run(given), run(taken_as), strict=True):
        assert found.isfinite().all() and torch.equal(found, expected)


def told(message: str) -> None:
    finish()
    with pytest.raises(RuntimeError, match=message):
        late_checks.look()
    late_checks.look()
