"""Lengths of every form, and what is refused: with torch.nn's own error or a clear sentence, before anything runs."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels as sk

MODULES = ("RNN", "GRU", "LSTM")


@pytest.fixture(autouse=True)
def _values_on_a_gpu_are_waited_for(monkeypatch):
    monkeypatch.setenv("SEQKERNELS_CHECK", "1")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_lengths_of_every_integer_dtype_and_lists_are_taken(dtype):
    rnn, x, lengths = sk.GRU(4, 5), torch.randn(6, 3, 4), [2, 6, 0]
    expected = rnn(x, lengths=torch.tensor(lengths))[0]
    assert torch.equal(rnn(x, lengths=torch.tensor(lengths, dtype=dtype))[0], expected)
    assert torch.equal(rnn(x, lengths=lengths)[0], expected)


@pytest.mark.parametrize("name", MODULES)
def test_empty_sequences_give_back_their_state(name):
    rnn, x = getattr(sk, name)(4, 5, 2, bidirectional=True), torch.randn(6, 3, 4)
    h_0, c_0 = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    _, state = rnn(x, (h_0, c_0) if name == "LSTM" else h_0, lengths=torch.tensor([3, 0, 5]))
    for final, first in zip(state, (h_0, c_0), strict=True) if name == "LSTM" else [(state, h_0)]:
        assert torch.equal(final[:, 1], first[:, 1]) and not torch.equal(final[:, 0], first[:, 0])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4)], ids=["no steps", "no sequences"])
def test_nothing_to_do_is_done(name, shape):
    rnn = getattr(sk, name)(4, 5, 2, bidirectional=True)
    lengths = torch.zeros(shape[1], dtype=torch.long)
    for given in [{}, {"lengths": lengths}] if shape[0] else [{"lengths": lengths}]:
        output, state = rnn(torch.randn(shape, requires_grad=True), **given)
        assert output.shape == (*shape[:2], 10)
        assert (state[0] if name == "LSTM" else state).shape == (4, shape[1], 5)
        output.sum().backward()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 4)], ids=["padded", "unbatched"])
def test_no_steps_without_lengths_are_torchs_error(name, shape):
    for module in (getattr(torch.nn, name)(4, 5), getattr(sk, name)(4, 5)):
        with pytest.raises(RuntimeError, match=r"^Expected sequence length to be larger than 0 in RNN$"):
            module(torch.zeros(shape))


BAD_LENGTHS = {
    "negative": (torch.tensor([3, -1, 2]), ValueError, r"between 0 and the 6 steps.*\[3, -1, 2\]"),
    "too long": (torch.tensor([3, 7, 2]), ValueError, r"between 0 and the 6 steps.*\[3, 7, 2\]"),
    "too few": (torch.tensor([3, 2]), ValueError, r"lengths is \[3\].*\[2\]"),
    "too many": (torch.tensor([3, 2, 1, 1]), ValueError, r"lengths is \[3\].*\[4\]"),
    "a matrix": (torch.tensor([[3, 2, 1]]), ValueError, r"lengths is \[3\].*\[1, 3\]"),
    "floats": (torch.tensor([3.0, 2.0, 1.0]), TypeError, "lengths must be integers, got torch.float32"),
    "bools": (torch.tensor([True, False, True]), TypeError, "lengths must be integers, got torch.bool"),
    "a list of floats": ([3.0, 2.0, 1.0], TypeError, "lengths must be integers"),
    "a number": (3, TypeError, "lengths must be a Tensor or a list of 64-bit integers, got 3"),
    "a list with None": ([3, None, 1], TypeError, r"a list of 64-bit integers, got \[3, None, 1\]"),
    "too many bits": ([3, 1 << 63, 1], TypeError, "a list of 64-bit integers"),
}


@pytest.mark.parametrize("bad", BAD_LENGTHS)
@pytest.mark.parametrize("name", MODULES)
def test_bad_lengths_are_refused(name, bad):
    lengths, error, message = BAD_LENGTHS[bad]
    with pytest.raises(error, match=message):
        getattr(sk, name)(4, 5)(torch.randn(6, 3, 4), lengths=lengths)


BAD_CU_SEQLENS = {
    "falling": (torch.tensor([0, 4, 3, 6]), ValueError, "never fall"),
    "not from zero": (torch.tensor([1, 4, 6]), ValueError, "start at 0"),
    "not to the end": (torch.tensor([0, 4, 5]), ValueError, "number of rows of the input, 6"),
    "beyond the end": (torch.tensor([0, 4, 9]), ValueError, "number of rows of the input, 6"),
    "empty": (torch.tensor([], dtype=torch.long), ValueError, r"\[sequences \+ 1\]"),
    "a matrix": (torch.tensor([[0, 6]]), ValueError, r"\[sequences \+ 1\]"),
    "floats": (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens must be integers"),
    "a number": (6, TypeError, "cu_seqlens must be a Tensor or a list"),
}


@pytest.mark.parametrize("bad", BAD_CU_SEQLENS)
def test_bad_cu_seqlens_are_refused(bad):
    cu_seqlens, error, message = BAD_CU_SEQLENS[bad]
    with pytest.raises(error, match=message):
        sk.functional.gru(torch.randn(6, 4), None, sk.GRU(4, 5)._flat_weights, cu_seqlens=cu_seqlens)


def test_a_sequence_longer_than_max_seqlen_is_refused():
    weights = sk.GRU(4, 5)._flat_weights
    with pytest.raises(ValueError, match="between 0 and the 3 steps"):
        sk.functional.gru(torch.randn(6, 4), None, weights, cu_seqlens=torch.tensor([0, 4, 6]), max_seqlen=3)


def packed(data_rows: int = 6, batch_sizes=(3, 2, 1), sorted_indices=None, unsorted_indices=None) -> PackedSequence:
    return PackedSequence(
        torch.randn(data_rows, 4), torch.tensor(batch_sizes, device="cpu"), sorted_indices, unsorted_indices
    )


BAD_PACKED = {
    "fewer rows": (lambda: packed(5), "add up to 6 rows, but data has 5"),
    "more rows": (lambda: packed(7), "add up to 6 rows, but data has 7"),
    "rising": (lambda: packed(6, (2, 3, 1)), "must not rise"),
    "negative": (lambda: packed(6, (4, 3, -1)), "must not rise nor be negative"),
    "no step": (lambda: packed(0, ()), "at least one step"),
    "indices of another batch": (lambda: packed(6, (3, 2, 1), torch.arange(2), torch.arange(2)), "sorted_indices is"),
}


@pytest.mark.parametrize("bad", BAD_PACKED)
@pytest.mark.parametrize("name", MODULES)
def test_a_packed_sequence_that_does_not_fit_itself_is_refused(name, bad):
    make, message = BAD_PACKED[bad]
    with pytest.raises((ValueError, RuntimeError), match=message):
        getattr(sk, name)(4, 5)(make())


def test_lengths_go_with_one_padded_batch_alone():
    rnn, lengths = sk.GRU(4, 5), torch.tensor([3])
    with pytest.raises(ValueError, match="has its lengths in it"):
        rnn(pack_padded_sequence(torch.randn(3, 1, 4), [3]), lengths=lengths)
    with pytest.raises(ValueError, match="3-D input"):
        rnn(torch.randn(3, 4), lengths=lengths)
    with pytest.raises(ValueError, match="not both"):
        sk.functional.gru(torch.randn(3, 4), None, rnn._flat_weights, lengths=lengths, cu_seqlens=torch.tensor([0, 3]))


BAD_INPUT = {
    "rank": lambda rnn: rnn(torch.randn(2, 3, 3, 4)),
    "feature size": lambda rnn: rnn(torch.randn(6, 3, 5)),
    "feature size, packed": lambda rnn: rnn(pack_padded_sequence(torch.randn(6, 2, 5), [6, 2])),
    "dtype": lambda rnn: rnn(torch.randn(6, 3, 4).double()),
    "integer input": lambda rnn: rnn(torch.ones(6, 3, 4, dtype=torch.long)),
    "hidden layers": lambda rnn: rnn(torch.randn(6, 3, 4), state(rnn, 2, 3, 5)),
    "hidden batch": lambda rnn: rnn(torch.randn(6, 3, 4), state(rnn, 1, 4, 5)),
    "hidden batch, packed": lambda rnn: rnn(pack_padded_sequence(torch.randn(6, 2, 4), [6, 2]), state(rnn, 1, 3, 5)),
    "hidden size": lambda rnn: rnn(torch.randn(6, 3, 4), state(rnn, 1, 3, 6)),
    "hidden rank": lambda rnn: rnn(torch.randn(6, 3, 4), state(rnn, 3, 5)),
    "hidden rank, unbatched": lambda rnn: rnn(torch.randn(6, 4), state(rnn, 1, 1, 5)),
}


def state(rnn: nn.Module, *shape: int):
    return (torch.zeros(shape), torch.zeros(shape)) if rnn.mode == "LSTM" else torch.zeros(shape)


@pytest.mark.parametrize("bad", BAD_INPUT)
@pytest.mark.parametrize("name", MODULES)
def test_bad_input_raises_what_torch_nn_raises(name, bad):
    with pytest.raises(Exception) as expected:
        BAD_INPUT[bad](getattr(nn, name)(4, 5))
    with pytest.raises(type(expected.value)) as ours:
        BAD_INPUT[bad](getattr(sk, name)(4, 5))
    if name == "LSTM" and bad.endswith("packed"):
        return  # nn.LSTM checks nothing here: its matrix product fails, where ours says what is wrong
    if torch.__version__ < "2.11" and bad in ("dtype", "integer input"):
        return  # that torch says the same in other words
    assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize("name", MODULES)
def test_a_state_of_another_dtype_or_device_is_refused(name):
    rnn = getattr(sk, name)(4, 5)
    wrong = state(rnn, 1, 3, 5)
    for change in (lambda s: s.double(), lambda s: s.to("meta")):
        hx = tuple(map(change, wrong)) if name == "LSTM" else change(wrong)
        with pytest.raises(RuntimeError, match=r"does not match input dtype|not at the same device"):
            rnn(torch.randn(6, 3, 4), hx)
    with pytest.raises(RuntimeError, match="not at the same device"):
        rnn(torch.randn(6, 3, 4, device="meta"))


def test_weights_of_the_wrong_number_are_refused():
    with pytest.raises(ValueError, match="expected 4 weights for each of 2 layers and directions, got 4 in all"):
        sk.functional.gru(torch.randn(6, 3, 4), None, sk.GRU(4, 5)._flat_weights, num_layers=2)


def test_an_impossible_backend_is_refused_with_its_reason():
    rnn = sk.GRU(4, 5)
    rnn.backend = "gpu"
    with pytest.raises(ValueError, match="there is no such backend"):
        rnn(torch.randn(6, 3, 4))


def test_too_large_a_problem_runs_out_of_memory_with_an_error_and_no_harm():
    rnn = sk.GRU(1, 1)
    with pytest.raises(RuntimeError, match="memory"):
        rnn(torch.zeros(1, 1, 1).expand(1 << 40, 1, 1))
    assert rnn(torch.randn(2, 1, 1))[0].isfinite().all()


def test_rows_behind_the_last_step_are_zeros_whatever_lies_behind_a_sequence():
    """So that what multiplies them by zero may: where lengths are on a GPU, nobody knows how many rows are used."""
    rows = torch.tensor([[1.0], [float("nan")], [2.0], [float("inf")]], requires_grad=True)
    index, inverse = torch.tensor([2, 0, -1, -1]), torch.tensor([1, -1, 0, -1])
    gathered = torch.ops.seqkernels.gather_rows(rows, index, inverse)
    assert gathered.tolist() == [[2.0], [1.0], [0.0], [0.0]]
    gathered.backward(torch.tensor([[3.0], [4.0], [float("nan")], [float("nan")]]))
    assert rows.grad.tolist() == [[4.0], [0.0], [3.0], [0.0]]


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in torch.utils._pytree.tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_one_long_sequence_beside_many_short_ones_costs_their_rows_alone(name):
    rnn, lengths = getattr(sk, name)(3, 4), torch.tensor([1] * 300 + [2000] + [1] * 300)
    x = torch.randn(int(lengths.sum()), 3, requires_grad=True)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    run = getattr(sk.functional, name.lower())
    with LargestTensor() as largest:
        y, _ = run(x, None, rnn._flat_weights, cu_seqlens=cu_seqlens)
        y.sum().backward()
    assert largest.elements <= 20 * len(x)  # the saved state of an LSTM: 5 blocks of 4 units a row
    with LargestTensor() as largest:
        bounded, _ = run(x, None, rnn._flat_weights, cu_seqlens=cu_seqlens, max_seqlen=1 << 40)
    assert largest.elements <= 20 * len(x) and torch.equal(bounded, y)
    padded, grad = torch.nn.utils.rnn.pad_sequence(list(x.detach().split(lengths.tolist()))), x.grad
    padded.requires_grad_()
    with LargestTensor() as largest:
        of_padded = rnn(padded, lengths=lengths)[0]
        of_padded.sum().backward()
    assert largest.elements <= 4 * padded[..., 0].numel()  # y itself
    torch.testing.assert_close(torch.cat([of_padded[:n, b] for b, n in enumerate(lengths)]), y)
    torch.testing.assert_close(torch.cat([padded.grad[:n, b] for b, n in enumerate(lengths)]), grad)
