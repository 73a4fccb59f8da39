"""What may take part in a call, and how its input may lie, for tests of the short way on a CPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


AS_THEY_LIE = {
    "every other feature": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "sequences first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "the middle of more": lambda x: torch.cat([x, x, x])[5:10],
    "one sequence for all": lambda x: x[:, :1].expand(5, 3, 4),
    "to be negated": lambda x: torch._neg_view(-x),
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}
