"""What may take part in a call, and how its input may lie, for tests of the short way on a CPU; and how it stands
beside the long way."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqkernels import functional


def counted(monkeypatch, name: str) -> list:
    """A call in it for each that goes the long way, by the function `name` of seqkernels.functional."""
    calls, run = [], getattr(functional, name)

    def counting(*args, **options):
        calls.append(args)
        return run(*args, **options)

    monkeypatch.setattr(functional, name, counting)
    return calls


def assert_same(short, long) -> None:
    """Of two outcomes: an error's class and sentence, or tensors (or None), which have the same bits, and strides."""
    assert type(short) is type(long) and len(short) == len(long)
    if isinstance(short[0], type):
        assert short == long
        return
    assert short[1] == long[1]
    for a, b in zip(short[0], long[0], strict=True):
        assert (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and torch.equal(a, b)))


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


class _Seeing:
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def see(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(_Seeing, TorchFunctionMode):
    __torch_function__ = _Seeing.see


class Operations(_Seeing, TorchDispatchMode):
    __torch_dispatch__ = _Seeing.see


AS_THEY_LIE = {
    "every other feature": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "sequences first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "the middle of more": lambda x: torch.cat([x, x, x])[5:10],
    "one sequence for all": lambda x: x[:, :1].expand(5, 3, 4),
    "to be negated": lambda x: torch._neg_view(-x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}
