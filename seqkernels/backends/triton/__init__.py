"""The operator pair by Triton kernels: any GPU that Triton reaches, or its interpreter on the CPU, for tests.

This file says when it runs, `tiles` how a layer is cut, `layer` what a launch needs of it, `host` which kernels and
products make a pass, `kernels` and `stepwise` what these compute, by the formulas of `algebra` and the loads of
`memory`; `norm_host`, `norms` and `resident_norms` are the same of layers with layer norm.
"""

from seqkernels.backends import costs
from seqkernels.backends.call import NO_TRANSFORMS, RESETS, Call, no_options
from seqkernels.backends.triton.host import backward, forward, masked_backward, masked_forward
from seqkernels.backends.triton.norm_host import layer_norm_backward, layer_norm_forward
from seqkernels.backends.triton.tiles import DTYPES, NO_KERNEL, launch_of, step_cost
from seqkernels.hardware import INTERPRETED, NO_TRITON, Machine

__all__ = [
    "DESCRIPTION",
    "DTYPES",
    "backward",
    "estimate",
    "forward",
    "kernel",
    "layer_norm_backward",
    "layer_norm_forward",
    "masked_backward",
    "masked_forward",
    "plan_launch",
    "reason_not_default",
    "unsupported",
]

DESCRIPTION = "kernels that Triton compiles for this GPU"


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type == "cpu" and not machine.interpreter:
        return "the tensors are on the CPU (TRITON_INTERPRET=1 lets Triton's kernels run there, slowly, for tests)"
    if call.device_type not in ("cpu", "cuda"):
        return f"the tensors are on {call.device_type}"
    if not machine.triton:
        return NO_TRITON
    if call.dtype not in DTYPES:
        return NO_KERNEL.format(call.dtype)
    if call.options and not _has_options(call):
        return no_options(call)
    if call.transformed:
        return NO_TRANSFORMS
    gpu = machine.gpu
    if gpu and not gpu.amd and int(gpu.target.removeprefix("sm_")) < 80:
        return f"Triton needs compute capability 8.0, {gpu.name} has {gpu.target}"
    return None


def _has_options(call: Call) -> bool:
    if call.options == (RESETS,):
        return not call.projected
    others = set(call.options) - {"zoneout", "recurrent_dropout", "candidate_dropout"}
    # An RNN without norms saves its state alone, and its backward pass would need the one that zoneout has replaced.
    return others == {"layer_norm"} or (not others and not (call.cell.startswith("rnn") and "zoneout" in call.options))


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return "Triton's interpreter runs for those who name it: backend='triton'" if machine.interpreter else None


def estimate(call: Call, machine: Machine) -> float | None:
    gpu = machine.gpu
    if call.device_type != "cuda" or gpu is None or not call.hidden_size:
        return None
    passes = (False, True) if call.training else (False,)
    steps = sum(step_cost(call, gpu, backward) for backward in passes)
    return call.layers * steps + costs.of_call("cuda", call, gpu)  # whose host does as much, and has been measured


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    return tuple(map(int, launch_of(call, machine.gpu or INTERPRETED))) if call.hidden_size else ()


def kernel(call: Call, machine: Machine) -> str:
    return str(launch_of(call, machine.gpu or INTERPRETED)) if call.hidden_size else ""
