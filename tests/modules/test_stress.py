"""Many calls, several threads, and processes that fork."""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operators import NO_CPU_KERNELS, Call, backward, forward
from torch.utils.data import DataLoader, Dataset

import seqkernels as sk
from seqkernels.hardware import THIS_MACHINE

FIELDS = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
Mallinfo = type("Mallinfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in FIELDS]})


def allocated_bytes() -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def assert_memory_stays_flat(call: Callable[[], object]) -> None:
    def growth(calls: int) -> float:
        before = allocated_bytes()
        for _ in range(calls):
            call()
        return (allocated_bytes() - before) / calls

    growth(300)
    assert min(growth(1000) for _ in range(3)) < 2  # bytes a call; what leaks does so in each of the three


needs_mallinfo2 = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")


@needs_mallinfo2
@pytest.mark.parametrize("name", ["GRU", "LSTM", "GRUCell"])
def test_memory_stays_flat_over_many_calls(name):
    module, lengths = getattr(sk, name)(8, 16), torch.tensor([5, 2, 0, 3])
    x = torch.randn(4, 8) if name == "GRUCell" else torch.randn(5, 4, 8)
    options = {} if name == "GRUCell" else {"lengths": lengths}

    def call() -> None:
        output = module(x, **options)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
        with torch.no_grad():
            module(x)

    assert_memory_stays_flat(call)


@needs_mallinfo2
@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("wrong", ["cell", "state", "path"])
def test_memory_stays_flat_over_many_calls_that_are_refused(wrong, passes):
    """By the operators of the native backends: what they own of their arguments is freed all the same."""
    if NO_CPU_KERNELS:
        pytest.skip(NO_CPU_KERNELS)
    if wrong == "path" and not THIS_MACHINE.emulator:
        pytest.skip("needs the emulator: `make test` builds it")
    cell, x, weights, h_0, *_ = Call("gru").arguments()
    y, _, _, saved = forward("torch_eager")(cell, x, weights, h_0, None, None, True)
    cell, h_0 = "of no such name" if wrong == "cell" else cell, h_0[..., 1:] if wrong == "state" else h_0
    layer = x, weights, h_0, None, None
    args = (cell, *layer, True) if passes == "forward" else (cell, y, None, None, *layer, y, saved, True, True)
    operator, launch = {"forward": forward, "backward": backward}[passes]("cpu"), []
    if wrong == "path":
        operator, launch = getattr(torch.ops.seqkernels, f"cuda_{passes}"), [False, 99, 1, 1, 1]

    def call() -> None:
        with pytest.raises(RuntimeError, match=r"unknown cell|the hidden size is|unknown path"):
            operator(*args, *launch)

    assert_memory_stays_flat(call)


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

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
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
