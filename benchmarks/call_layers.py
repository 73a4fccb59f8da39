"""One layer of an RNN, GRU or LSTM called below the module: by the functional, by the operator, by the native code
alone. What a contender here costs less than the one above it is what that one adds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import require
from benchmarks.cases import Case
from benchmarks.contenders import Unavailable, data, inferring, prepared, weights
from benchmarks.problems import operator_cell


class Arguments(NamedTuple):
    """What a call of the operator takes, made once."""

    plan: Any
    call: Any
    x: Tensor  # [N, I]
    weights: list[Tensor]
    h_0: Tensor
    c_0: Tensor | None

    @property
    def layer(self) -> tuple:
        return self.call.cell, self.x, self.weights, self.h_0, self.c_0, None


def functional_layer(case: Case) -> Callable[[], list[Tensor]]:
    module = weights(case)
    function = getattr(require("seqkernels").functional, case.cell.lower())
    return prepared(case, module, lambda x: function(x, None, list(module.parameters())))


def arguments(case: Case, x: Tensor, parameters: list[Tensor]) -> Arguments:
    """x: ``[T, B, I]``."""
    require("seqkernels")
    from seqkernels import inputs, select  # not at hand where --root names another folder, before require

    with torch.set_grad_enabled(case.mode == "train"):
        prepared_inputs = inputs.prepare(operator_cell(case.cell), x, None, parameters, 1, 1)
    plan = select.plan_of(prepared_inputs.call, x.device, None)
    return Arguments(plan, prepared_inputs.call, x.flatten(0, 1), parameters, prepared_inputs.h_0, prepared_inputs.c_0)


def operator_layer(case: Case) -> Callable[[], list[Tensor]]:
    module = weights(case)
    made: list[Arguments] = []
    ops = require("seqkernels.ops")

    def call(x: Tensor) -> tuple[Tensor, Any]:
        if not made:
            made.append(arguments(case, x, list(module.parameters())))
        known = made[0]
        rows, save = x.view(known.x.shape), case.mode == "train"
        y, h_n, c_n = ops.recurrence_forward(
            known.plan, known.call, rows, known.weights, known.h_0, known.c_0, None, save
        )
        return y, h_n if known.c_0 is None else (h_n, c_n)

    return prepared(case, module, call)


def native_layer(case: Case) -> Callable[[], list[Tensor]]:
    module = weights(case).to(case.device, case.torch_dtype).requires_grad_(False)
    x = data(case).to(case.device, case.torch_dtype)
    known = arguments(case, x, list(module.parameters()))
    train, has_c = case.mode == "train", known.c_0 is not None
    forward, backward = native_passes(known)
    grad_y = torch.ones(known.x.shape[0], case.shape.H, dtype=x.dtype, device=x.device)

    @inferring
    def run() -> list[Tensor]:
        y, h_n, c_n, saved = forward(*known.layer, train)
        results = [y, h_n, c_n] if has_c else [y, h_n]
        if train:
            grad_x, grads, _, _ = backward(known.call.cell, grad_y, None, None, *known.layer[1:], y, saved, True, True)
            results += [grad_x, *grads]
        return results

    return run


def native_passes(known: Arguments) -> tuple[Callable, Callable]:
    """The operators that C++ implements, without autograd."""
    ops, launch = torch.ops.seqkernels, known.plan.launch
    if known.plan.backend == "cpu":
        return ops.recurrence_forward.cpu, ops.recurrence_backward.cpu
    if known.plan.backend != "cuda":
        raise Unavailable(f"the backend {known.plan.backend} has no native code of ours")
    tf32, *passes = launch
    of_pass = len(passes) // 2
    return (
        lambda *args: ops.cuda_forward(*args, bool(tf32), *passes[:of_pass]),
        lambda *args: ops.cuda_backward(*args, bool(tf32), *passes[of_pass:]),
    )


LAYERS: dict[str, Callable[[Case], Callable[[], list[Tensor]]]] = {
    "seqkernels functional": functional_layer,
    "seqkernels operator": operator_layer,
    "seqkernels C++": native_layer,
}
