"""torch's own kernels for NVIDIA GPUs, those of cuDNN: all layers in one call, where they are the faster ones.

What cuDNN's backward needs of its forward is in a form that cuDNN alone knows, so this backend has no operators of the
pair's contract: `autograd` runs it by an autograd function of its own, `host` makes the calls.
This file says when it runs.
"""

import math

import torch

from seqkernels.backends import costs
from seqkernels.backends.call import CUDNN_STEPS, NO_TRANSFORMS, Call, no_options
from seqkernels.backends.cudnn.autograd import run
from seqkernels.backends.cudnn.host import MODES, backward, forward
from seqkernels.backends.precision import NATIVE_DTYPES
from seqkernels.hardware import GPU, Machine

__all__ = [
    "DESCRIPTION",
    "backward",
    "estimate",
    "forward",
    "kernel",
    "plan_launch",
    "reason_not_default",
    "run",
    "unsupported",
]

DESCRIPTION = "torch's own kernels for NVIDIA GPUs"

# Recurrent weights with which a block of the kernel for small H has the registers of a multiprocessor for itself (seen
# by nsys), and beyond which it takes longer.
_SMALL_WEIGHTS = 128 * 384


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type != "cuda" and not (call.device_type == "cpu" and machine.cudnn):
        return f"the tensors are on {call.device_type}"
    gpu = machine.gpu
    if gpu and gpu.amd:
        return f"{gpu.name} has MIOpen, not cuDNN"
    if not machine.cudnn:
        return "this torch has no cuDNN"
    if not call.cudnn:
        return "torch.backends.cudnn.enabled is False"
    if call.cell not in MODES:
        return f"cuDNN has no kernel for {call.cell}"
    if call.dtype not in NATIVE_DTYPES:
        return f"cuDNN does not take {call.dtype}"
    if call.dtype == torch.bfloat16 and gpu and (machine.cudnn < 91300 or int(gpu.target.removeprefix("sm_")) < 80):
        return f"bfloat16 needs cuDNN 9.13 and compute capability 8.0, not cuDNN {machine.cudnn} and {gpu.target}"
    if call.options:
        return no_options(call)
    if call.transformed or call.vmapped:
        return NO_TRANSFORMS
    if call.compiled:
        return "torch.compile needs an operator whose results have known sizes, and what cuDNN saves has not"
    if call.layout == "cell":
        return "cuDNN has kernels for whole sequences, not for a cell"
    if call.layout == "device":
        return "cuDNN must know on the CPU how long sequences are, and these lengths are on the GPU"
    if call.steps > CUDNN_STEPS:
        return f"cuDNN takes at most {CUDNN_STEPS} steps"
    if call.capturing:
        return "cuDNN's kernels for packed batches are not known to survive in a CUDA graph"
    return None


def reason_not_default(call: Call, machine: Machine) -> str | None:
    if call.device_type == "cpu":
        return "a stand-in for cuDNN runs on the CPU for those who name it: backend='cudnn'"
    if call.deterministic:
        return "cuDNN does not promise the same bits on every run, which torch.use_deterministic_algorithms asks for"
    return None


def estimate(call: Call, machine: Machine) -> float | None:
    gpu = machine.gpu
    if call.device_type != "cuda" or gpu is None or not call.hidden_size:
        return None
    passes = (False, True) if call.training else (False,)
    steps = sum(costs.cost(terms(call, gpu, backward), gpu) for backward in passes)
    return call.layers * steps + costs.of_call("cudnn", call, gpu)


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    return ()


def kernel(call: Call, machine: Machine) -> str:
    gpu = machine.gpu
    if gpu is None or not call.hidden_size:
        return ""
    forward, backward = (algorithm(call, gpu, backward) for backward in (False, True))
    return forward if forward == backward else f"forward {forward}, backward {backward}"


def algorithm(call: Call, gpu: GPU, backward: bool) -> str:
    """Which of cuDNN's algorithms torch asks for: get_algo in aten/src/ATen/native/cudnn/RNN.cpp of PyTorch."""
    if call.projected or call.layout != "padded" or call.dtype == torch.float64:
        return "STANDARD"
    simple = call.gates == 1
    if call.hidden_size <= ((256 if simple else 128) if backward else (384 if simple else 192)):
        return "PERSIST_STATIC_SMALL_H"
    target = int(gpu.target.removeprefix("sm_"))
    fits = call.layers == 1 and call.directions == 1 and call.hidden_size <= 1024 and call.hidden_size % 128 == 0
    fits = fits and call.dtype == torch.float16 and call.input_size % 128 == 0
    fits = fits and call.sequences % 8 == 0 and call.sequences <= 128 and call.gates != 3
    fits = fits and not (simple and call.sequences >= 96 and call.hidden_size >= 896)
    if fits and target >= 80 and target % 10 != 6 and gpu.multiprocessors >= 98:
        return "PERSIST_STATIC"
    return "STANDARD"


def terms(call: Call, gpu: GPU, backward: bool) -> costs.Terms:
    """Of a step, by the algorithm."""
    chosen, way = algorithm(call, gpu, backward), "backward" if backward else "forward"
    if chosen == "PERSIST_STATIC":
        return costs.Terms(f"cudnn {chosen} {way}", (1.0,))
    # In bfloat16 cuDNN takes as long with its kernel for small H as without.
    if chosen == "STANDARD" or call.dtype == torch.bfloat16:
        times = 2.0 if call.projected else 1.0
        return costs.Terms(f"cudnn STANDARD {way}", (times,), costs.step_product(call, gpu))
    together = max(1, _SMALL_WEIGHTS // call.weights)  # blocks on a multiprocessor
    padded = -(-call.hidden_size // 32) * 32
    beyond = max(0, call.gates * padded * padded - _SMALL_WEIGHTS) / 1e4
    waves = costs.waves(call, together, gpu.multiprocessors)
    of_tile = (1.0, beyond, math.log2(max(call.sequences, 1)))
    return costs.Terms(f"cudnn {chosen} {way}", tuple(waves * term for term in of_tile))
