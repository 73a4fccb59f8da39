"""Properties that hold whatever the numbers are."""

import math

import pytest
import torch
from cases import CELLS, Case, on_device
from torch.nn.utils.rnn import pack_sequence

import seqkernels as sk

LENGTHS = (4, 7, 0, 1, 7, 3)


def module_of(cell: str, backend: str, dtype: torch.dtype, **options):
    module = Case(cell, dtype, hidden_size=19, num_layers=2, **options).module(sk)
    module.backend = backend
    return module


def only_h(state):
    return state[0] if isinstance(state, tuple) else state


def close(ours, expected):
    tolerance = 16 * torch.finfo(only_h(expected).dtype).eps
    torch.testing.assert_close(ours, expected, rtol=100 * tolerance, atol=tolerance)


@pytest.mark.parametrize("cell", CELLS)
def test_ragged_equals_each_sequence_alone(cell, backend, dtype):
    module, x = module_of(cell, backend, dtype, bidirectional=True), torch.randn(7, 6, 4, dtype=dtype)
    output, state = module(x, lengths=on_device(LENGTHS, backend))
    for b, length in enumerate(LENGTHS):
        assert not output[length:, b].any()
        if length == 0:
            assert not only_h(state)[:, b].any()
            continue
        alone, state_alone = module(x[:length, b])
        close(output[:length, b], alone)
        close(only_h(state)[:, b], only_h(state_alone))


@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_behind_a_sequence_is_never_read(cell, backend, dtype):
    module, x = module_of(cell, backend, dtype, bidirectional=True), torch.randn(7, 6, 4, dtype=dtype)
    lengths = on_device(LENGTHS, backend)
    expected = module(x, lengths=lengths)[0]
    x[torch.arange(7).unsqueeze(1) >= torch.tensor(LENGTHS)] = float("nan")
    x.requires_grad_()
    output = module(x, lengths=lengths)[0]
    assert torch.equal(output, expected)
    output.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_cut_and_carry_equals_one_run(cell, backend, dtype):
    module, x = module_of(cell, backend, dtype), torch.randn(9, 3, 4, dtype=dtype)
    whole, state = module(x)
    first, carried = module(x[:4])
    second, end = module(x[4:], carried)
    close(torch.cat([first, second]), whole)
    close(end, state)


@pytest.mark.parametrize("cell", CELLS)
def test_permuted_batch_gives_permuted_result(cell, backend, dtype):
    module, x = module_of(cell, backend, dtype, bidirectional=True), torch.randn(7, 6, 4, dtype=dtype)
    order, lengths = torch.randperm(6), on_device(LENGTHS, backend)
    output, state = module(x, lengths=lengths)
    permuted, permuted_state = module(x[:, order], lengths=lengths[order.to(lengths.device)])
    close(permuted, output[:, order])
    close(only_h(permuted_state), only_h(state)[:, order])


@pytest.mark.parametrize("cell", CELLS)
def test_reverse_direction_is_flip_forward_flip(cell, backend, dtype):
    both = Case(cell, dtype, hidden_size=19, bidirectional=True).module(sk)
    one = Case(cell, dtype, hidden_size=19).module(sk)
    both.backend = one.backend = backend
    one.load_state_dict({k.removesuffix("_reverse"): v for k, v in both.state_dict().items() if k.endswith("_reverse")})
    x = torch.randn(5, 3, 4, dtype=dtype)
    output, state = both(x)
    flipped, flipped_state = one(x.flip(0))
    close(output[..., 19:], flipped.flip(0))
    close(only_h(state)[1:], only_h(flipped_state))


@pytest.mark.parametrize("cell", CELLS)
def test_packed_lengths_and_cu_seqlens_are_one(cell, backend, dtype):
    module = module_of(cell, backend, dtype, bidirectional=True)
    sequences = [torch.randn(n, 4, dtype=dtype) for n in (5, 2, 6, 2)]
    padded = torch.nn.utils.rnn.pad_sequence(sequences)
    lengths = on_device([5, 2, 6, 2], backend)
    output, state = module(padded, lengths=lengths)
    with torch.device("cpu"):  # torch makes the lengths on the default device, and refuses them there
        packed = pack_sequence(sequences, enforce_sorted=False)
    packed, packed_state = module(packed)
    close(torch.nn.utils.rnn.pad_packed_sequence(packed)[0], output)
    close(packed_state, state)
    function = getattr(sk.functional, "rnn" if cell.startswith("rnn") else cell)
    more = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    options = {"num_layers": 2, "bidirectional": True, "cu_seqlens": ends, "backend": backend, **more}
    rows, rows_state = function(torch.cat(sequences), None, module._flat_weights, **options)
    close(rows, torch.cat([output[:n, b] for b, n in enumerate(lengths)]))
    close(rows_state, state)
    close(function(torch.cat(sequences), None, module._flat_weights, max_seqlen=9, **options)[0], rows)


@pytest.mark.parametrize("place", ["input", "h_0", "c_0", "w_ih", "w_hh", "b_hh", "w_hr"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_propagate_as_in_torch_nn(cell, place, backend):
    """Through outputs, final states and gradients: where torch has NaN, an infinity is not enough."""
    case = Case(cell, lengths=(3, 3), proj_size=2 if place == "w_hr" else 0)
    if place in ("c_0", "w_hr") and cell != "lstm":
        pytest.skip(f"{cell} has no {place}")
    for value in (math.nan, math.inf, -math.inf):
        results = []
        for namespace in (sk, torch.nn):
            module, (x, states) = case.module(namespace), case.data()
            module.backend = backend
            tensors = [x, *states, *module.parameters()]
            names = "input", *("h_0", "c_0")[: len(states)], "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"
            with torch.no_grad():
                tensors[names.index(place)].view(-1)[3] = value
            output, final = module(x, states if cell == "lstm" else states[0])
            outputs = [output, *(final if cell == "lstm" else [final])]
            results.append([*outputs, *torch.autograd.grad(sum(each.sum() for each in outputs), tensors)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("cell", CELLS)
def test_every_run_gives_the_same_bits(cell, threads, backend):
    if backend == "triton" and threads > 1:
        pytest.skip("Triton's kernels have no threads of the CPU")
    torch.set_num_threads(threads)
    module = Case(cell, hidden_size=70, num_layers=2, bidirectional=True).module(sk)
    module.backend = backend
    x = torch.randn(5, 33, 4)
    lengths = torch.randint(0, 6, (33,), device="cpu" if backend == "cudnn" else None)

    def run():
        module.zero_grad()
        output, state = module(x, lengths=lengths)
        (output.sum() + only_h(state).sum()).backward()
        return [output, only_h(state), *(p.grad for p in module.parameters())]

    first = run()
    for _ in range(1 if backend == "triton" else 3):  # its interpreter takes half a minute for each
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
