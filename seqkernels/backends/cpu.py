"""The operator pair by compiled kernels for the CPU: csrc/cpu, which defines the operators itself."""

from seqkernels.backends.call import NO_TRANSFORMS, RESETS, Call, no_options
from seqkernels.backends.precision import NATIVE_DTYPES
from seqkernels.hardware import Machine

DESCRIPTION = "compiled kernels for this CPU"


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type != "cpu":
        return f"the tensors are on {call.device_type}"
    if call.dtype not in NATIVE_DTYPES:
        return f"no CPU kernel for {call.dtype}"
    if call.options and not _has_options(call):
        return no_options(call)
    if call.transformed:
        return NO_TRANSFORMS
    return machine.native_missing or None


def _has_options(call: Call) -> bool:
    if call.options == (RESETS,):
        return True
    others = set(call.options) - {"zoneout", "recurrent_dropout", "candidate_dropout"}
    return others <= {"layer_norm", "blocks"} or others == {"proj_size"}


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return None


def estimate(call: Call, machine: Machine) -> float | None:
    return None


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    """[1]: of how many bfloat16 factors of float32 are the sum; (): they are multiplied as they are."""
    parts = _bfloat16_parts(call, machine)
    return (parts,) if parts else ()


def as_among_others(launch: tuple[int, ...]) -> tuple[int, int]:
    """[2]: the same, of few rows that get the bits which they would have in a call of more: products of few rows alone
    are added up in another order."""
    return (*(launch or (0,)), 1)  # type: ignore[return-value]


def keeping(launch: tuple[int, ...], slot: int) -> tuple[int, ...]:
    """[3]: the same, and the slot in which packed weights stay between calls (`seqkernels.kept_weights`); 0: none."""
    return *(*launch, 0, 0)[:2], slot


def kernel(call: Call, machine: Machine) -> str:
    parts = _bfloat16_parts(call, machine)
    return machine.isa + (f", float32 multiplied as {('one', 'two')[parts - 1]} bfloat16" if parts else "")


def _bfloat16_parts(call: Call, machine: Machine) -> int:
    return call.bfloat16_parts if machine.splits_float32 and not call.options else 0
