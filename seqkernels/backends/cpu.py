"""The operator pair by compiled kernels for the CPU: csrc/cpu, which defines the operators itself."""

from seqkernels.backends.call import NO_TRANSFORMS, Call
from seqkernels.backends.precision import NATIVE_DTYPES
from seqkernels.hardware import Machine

DESCRIPTION = "compiled kernels for this CPU"


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type != "cpu":
        return f"the tensors are on {call.device_type}"
    if call.dtype not in NATIVE_DTYPES:
        return f"no CPU kernel for {call.dtype}"
    if call.transformed:
        return NO_TRANSFORMS
    return machine.native_missing or None


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return None


def estimate(call: Call, machine: Machine) -> float | None:
    return None


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    return ()


def kernel(call: Call, machine: Machine) -> str:
    return machine.isa
