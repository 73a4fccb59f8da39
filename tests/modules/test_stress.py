"""Many calls, several threads, and processes that fork."""

import os
import resource
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import seqkernels as sk

CALLS = int(os.environ.get("STRESS_CALLS", "5000"))  # the figure, 100,000, takes minutes


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_memory_stays_flat_over_many_calls(name):
    rnn, x = getattr(sk, name)(8, 16), torch.randn(5, 4, 8)
    lengths = torch.tensor([5, 2, 0, 3])

    def call():
        rnn(x, lengths=lengths)[0].sum().backward()
        with torch.no_grad():
            rnn(x)

    for _ in range(300):
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(CALLS // 2):
        call()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


def test_two_threads_calling_one_module_get_right_answers():
    rnn = sk.LSTM(16, 40, 2, bidirectional=True)
    inputs = [torch.randn(9, 12, 16) for _ in range(2)]
    expected = [rnn(x)[0].detach() for x in inputs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(200):
            output = rnn(inputs[k])[0]
            torch.autograd.grad(output.sum(), list(rnn.parameters()))
            if not torch.equal(output, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Encoded(Dataset):
    def __init__(self) -> None:
        self.rnn = sk.GRU(8, 64)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.rnn(torch.full((20, 32, 8), float(index)))[0][-1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_data_loader_workers_forked_after_use_do_not_hang():
    data = Encoded()
    expected = torch.stack([data[k] for k in range(8)])  # the parent has used its threads
    batches = list(DataLoader(data, batch_size=4, num_workers=2, timeout=60, multiprocessing_context="fork"))
    torch.testing.assert_close(torch.cat(batches), expected)
