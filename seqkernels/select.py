"""Which backend runs a call, and why the others do not: a pure function of the call and the machine.

What a backend can run, what that costs and how it is launched the backends say themselves (`seqkernels.backends`).
"""

import functools
import logging
from typing import NamedTuple

import torch

from seqkernels import hardware
from seqkernels.backends import Backend, costs, cpu, cuda, cudnn, torch_eager, triton
from seqkernels.backends.call import RESETS, Call
from seqkernels.hardware import THIS_MACHINE, Machine

_log = logging.getLogger("seqkernels")

_MODULES: dict[str, Backend] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "cudnn": cudnn,
    "torch_eager": torch_eager,
}
# In order of preference, where no cost says otherwise; the last one takes everything.
BACKENDS = tuple(_MODULES)
PIECEWISE = ("cpu", "cuda", "triton")  # that have kernels which know pieces


class Plan(NamedTuple):
    """The backend that runs, the reason, and the reason against each other backend."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...]
    kernel: str = ""  # which of its kernels, where there is a choice and the call has its sizes
    launch: tuple[int, ...] = ()  # what its operators are told: the backend's own `Launch`; (): they plan by themselves

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}" + (f"; {self.kernel}" if self.kernel else "")]
        return "\n".join(lines + [f"  not {backend}: {reason}" for backend, reason in self.refusals])


def unsupported(backend: str, call: Call, machine: Machine) -> str | None:
    """Why `backend` cannot run `call` on `machine`; None if it can."""
    if backend not in _MODULES:
        return f"there is no such backend; choose one of {', '.join(BACKENDS)}"
    return _no_dtype(call) or _MODULES[backend].unsupported(call, machine)


def _no_dtype(call: Call) -> str | None:
    return None if call.dtype.is_floating_point else f"{call.dtype} is no floating dtype"


def plan(call: Call, machine: Machine = THIS_MACHINE, backend: str | None = None) -> Plan:
    """Choose for `call`: the backend of the lowest cost, and where costs say nothing the first that can run it.
    `backend` or SEQKERNELS_BACKEND forces one.

    Raises:
        ValueError: the forced backend cannot run the call, or none can; with each backend's reason.
    """
    forced = backend or machine.forced_backend
    if forced:
        reason = unsupported(forced, call, machine)
        if reason:
            raise _nothing_runs(call, {forced: reason})
        module = _MODULES[forced]
        return Plan(forced, "forced", (), module.kernel(call, machine), module.plan_launch(call, machine))
    against: dict[str, str] = {}
    estimates: dict[str, float | None] = {}  # of those that may run it
    for name, module in _MODULES.items():
        reason = _no_dtype(call) or module.unsupported(call, machine) or module.reason_not_default(call, machine)
        if reason:
            against[name] = reason
        else:
            estimates[name] = module.estimate(call, machine)
    if not estimates:
        raise _nothing_runs(call, against)
    chosen = _cheapest(estimates)
    against |= {name: _why_not(name, us, chosen, call, machine) for name, us in estimates.items() if name != chosen}
    module, cost = _MODULES[chosen], estimates[chosen]
    reason = module.DESCRIPTION + ("" if cost is None else f", {_in_words(cost, chosen, call, machine)}")
    refusals = tuple((name, against[name]) for name in BACKENDS if name != chosen)
    return Plan(chosen, reason, refusals, module.kernel(call, machine), module.plan_launch(call, machine))


_planned = functools.lru_cache(maxsize=4096)(plan)


def plan_of(call: Call, device: torch.device, backend: str | None) -> Plan:
    """The plan of a call on this machine, the same object for every call like it."""
    machine = hardware.machine_of(device)
    if torch.compiler.is_compiling():
        return plan(call, machine, backend)
    chosen = _planned(call, machine, backend)
    if logs():
        _log.debug("%s sequences %d: %s", call.cell, call.sequences, chosen)
    return chosen


def logs() -> bool:
    """Whether the log wants to know what runs."""
    return _log.isEnabledFor(logging.DEBUG)


def goes_piecewise(call: Call, layout: str, machine: Machine, backend: str | None = None) -> bool:
    """Whether a call with resets runs by kernels that go from piece to piece: a backend has them, or the one that is
    forced, and they are not estimated to take longer than others, for which all rows are copied into the order of the
    pieces and back. For those `layout` is that of the pieces; that there are more of them, and shorter ones, than
    sequences is left out of account."""
    decide = _goes_piecewise if torch.compiler.is_compiling() else _known_to_go_piecewise
    return decide(call, layout, machine, backend)


def _goes_piecewise(call: Call, layout: str, machine: Machine, backend: str | None) -> bool:
    within, copied = call._replace(options=(RESETS,)), call._replace(layout=layout)
    forced = backend or machine.forced_backend
    if forced and unsupported(forced, within, machine):
        return False
    chosen, other = (plan(of, machine, backend).backend for of in (within, copied))
    us, us_copied = _MODULES[chosen].estimate(within, machine), _MODULES[other].estimate(copied, machine)
    if us is None or us_copied is None or machine.gpu is None:
        return chosen in PIECEWISE
    return us <= us_copied + costs.copies(call, machine.gpu)


_known_to_go_piecewise = functools.lru_cache(maxsize=4096)(_goes_piecewise)


def _cheapest(estimates: dict[str, float | None]) -> str:
    known = {name: us for name, us in estimates.items() if us is not None}
    return min(known, key=lambda name: known[name]) if known else next(iter(estimates))


def _why_not(name: str, us: float | None, chosen: str, call: Call, machine: Machine) -> str:
    if us is None:
        return f"it could run, but {chosen} is preferred"
    return f"{_in_words(us, name, call, machine)} ({_MODULES[name].kernel(call, machine)})"


def _in_words(us: float, backend: str, call: Call, machine: Machine) -> str:
    passes = " forward and backward" if call.training else ""
    without = f" without {', '.join(call.options)}" if call.options else ""
    return f"about {us:.1f} us a step{passes}{without}, {costs.source(backend, machine.gpu)}"


def _nothing_runs(call: Call, against: dict[str, str]) -> ValueError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in against.items())
    return ValueError(f"no backend runs {call.cell} in {call.dtype} on {call.device_type}: {reasons}")
