"""Which backend runs a problem, and why the others do not: a pure function of the problem and the machine."""

from typing import NamedTuple

import torch

from seqkernels.hardware import HERE, Machine

# In order of preference; the last one takes everything.
BACKENDS = ("cpu", "torch_eager")

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a choice may depend on. Sizes are left out until a heuristic needs them: a plan that reads none of them
    puts no guard on them under torch.compile."""

    cell: str  # rnn_tanh, rnn_relu, gru, lstm
    device_type: str
    dtype: torch.dtype
    transformed: bool = False  # a torch.func transform or forward-mode AD is at work


class Plan(NamedTuple):
    """The backend that runs, the reason, and what speaks against each backend that was preferred to it."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        return "\n".join(lines + [f"  not {backend}: {reason}" for backend, reason in self.refusals])


def reason_against(backend: str, problem: Problem, machine: Machine) -> str | None:
    """Why `backend` cannot run `problem` on `machine`; None if it can."""
    if not problem.dtype.is_floating_point:
        return f"{problem.dtype} is no floating dtype"
    if backend == "torch_eager":
        return None
    if backend == "cpu":
        if problem.device_type != "cpu":
            return f"the tensors are on {problem.device_type}"
        if problem.dtype not in CPU_DTYPES:
            return f"no CPU kernel for {problem.dtype}"
        if problem.transformed:
            return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
        return None if machine.native else machine.native_missing
    return f"there is no such backend; choose one of {', '.join(BACKENDS)}"


def plan(problem: Problem, machine: Machine = HERE, backend: str | None = None) -> Plan:
    """Choose for `problem`; `backend` or SEQKERNELS_BACKEND forces one.

    Raises:
        ValueError: the forced backend cannot run the problem, or none can; with each backend's reason.
    """
    forced = backend or machine.forced_backend
    refusals = ()
    for candidate in (forced,) if forced else BACKENDS:
        against = reason_against(candidate, problem, machine)
        if against is None:
            why = "forced" if forced else _REASONS[candidate]
            return Plan(candidate, why, refusals)
        refusals += ((candidate, against),)
    raise ValueError(
        f"no backend runs {problem.cell} in {problem.dtype} on {problem.device_type}: "
        + "; ".join(f"{candidate}: {against}" for candidate, against in refusals)
    )


_REASONS = {
    "cpu": "compiled kernels for this CPU",
    "torch_eager": "plain torch operations run anywhere; slower than torch.nn where torch has a fused kernel",
}
