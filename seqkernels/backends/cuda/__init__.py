"""The operator pair by CUDA kernels (csrc/cuda): NVIDIA GPUs, in every dtype.

Four paths, of which each pass takes the cheapest that fits (`launch`): *single CTA*, one launch in which a block of
threads takes up to 8 sequences through all steps with the recurrent weights in its registers and shared memory;
*cluster*, the same by up to 16 blocks that share the hidden units and push new states to each other; *persistent grid*,
the same by as many blocks as run at the same time, which exchange through the L2 cache; and *stepwise*, for each step a
cuBLAS product and a kernel. Of padded stacks on the first two, layers may run at the same time (csrc/cuda/wavefront.h).
The first, in part, and the last have masks and layer norm (`seqkernels.masked_ops`,
`seqkernels.layer_norm_ops`). Nothing waits for the GPU, so all of them can be captured in a CUDA graph.

float32 products follow torch's switches: those inside the kernels torch.backends.cudnn.rnn, as nn.GRU's do; those that
cuBLAS multiplies torch.backends.cuda.matmul. A single CTA with masks or norms multiplies float32 exactly, whatever they
say.
"""

from seqkernels.backends import costs
from seqkernels.backends.call import NO_TRANSFORMS, Call, gpus_have_options, no_options
from seqkernels.backends.cuda.host import (
    backward,
    forward,
    layer_norm_forward,
    layer_norm_sweep_back,
    masked_backward,
    masked_forward,
)
from seqkernels.backends.cuda.launch import cheapest, launch_of
from seqkernels.backends.precision import NATIVE_DTYPES
from seqkernels.hardware import GPU, CudaBuild, Machine

__all__ = [
    "DESCRIPTION", "backward", "estimate", "forward", "kernel", "layer_norm_forward", "layer_norm_sweep_back",
    "masked_backward", "masked_forward", "plan_launch", "reason_not_default", "unsupported",
]  # fmt: skip

DESCRIPTION = "compiled kernels for NVIDIA GPUs"


def unsupported(call: Call, machine: Machine) -> str | None:
    if call.device_type != ("cpu" if machine.emulator else "cuda"):
        return f"the tensors are on {call.device_type}"
    if machine.cuda_missing:
        return machine.cuda_missing
    if machine.native_missing:  # which says what fits
        return machine.native_missing
    if call.dtype not in NATIVE_DTYPES:
        return f"no CUDA kernel for {call.dtype}"
    if call.options and not gpus_have_options(call):
        return no_options(call)
    if call.transformed:
        return NO_TRANSFORMS
    return _reason_against_code(machine.cuda_build, machine.gpu) if machine.gpu else None


def _reason_against_code(build: CudaBuild, gpu: GPU) -> str | None:
    """Why nothing that was built runs on `gpu`."""
    if gpu.amd:
        return f"{gpu.name} does not run CUDA"
    running = [target for target in build.targets if _runs(target, gpu)]
    if not running:
        return (
            f"the CUDA kernels here are built for {', '.join(build.targets)}, none of which {gpu.name} ({gpu.target}) "
            "runs. Remedy: build them with TORCH_CUDA_ARCH_LIST naming it"
        )
    # Machine code needs a driver for its major version of CUDA, PTX one that is no older than nvcc.
    needed = (build.nvcc[0], 0) if any(target.startswith("sm_") for target in running) else build.nvcc
    if gpu.driver and gpu.driver < needed:
        return (
            f"the CUDA kernels here need a driver for CUDA {needed[0]}.{needed[1]}, and this one is for "
            f"{gpu.driver[0]}.{gpu.driver[1]}. Remedy: a newer driver, or build them with an older nvcc"
        )
    return None


def _runs(target: str, gpu: GPU) -> bool:
    """Whether `gpu` runs code for `target`: machine code that of its generation, and no newer than it is, PTX all that
    is no newer; with an a at the end that of its own alone, with an f its generation's."""
    kind, _, number = target.partition("_")
    built, own = int(number.rstrip("af")), int(gpu.target.removeprefix("sm_"))
    if number.endswith("a"):
        return built == own
    return built <= own and (built // 10 == own // 10 or (kind == "compute" and not number.endswith("f")))


def reason_not_default(call: Call, machine: Machine) -> str | None:
    return "CUDA kernels run on the CPU for those who name them: backend='cuda'" if machine.emulator else None


def estimate(call: Call, machine: Machine) -> float | None:
    gpu = machine.gpu
    if call.device_type != "cuda" or gpu is None or not call.hidden_size:
        return None
    passes = (False, True) if call.training else (False,)
    # Layer after layer: what a wavefront gains nobody has measured, and what cuDNN takes has been.
    steps = sum(cheapest(call, gpu, backward)[1] for backward in passes)
    return call.layers * steps + costs.of_call("cuda", call, gpu)


def plan_launch(call: Call, machine: Machine) -> tuple[int, ...]:
    """By `launch.Launch`."""
    return launch_of(call, machine.gpu).to_ints() if call.hidden_size and machine.gpu else ()


def kernel(call: Call, machine: Machine) -> str:
    if not call.hidden_size or not machine.gpu:
        return ""
    gpu, chosen = machine.gpu, str(launch_of(call, machine.gpu))
    if gpu.clusters_missing:
        with_clusters = gpu._replace(clusters=tuple(gpu.multiprocessors // blocks for blocks in range(1, 17)))
        if chosen != str(launch_of(call, with_clusters)):
            return f"{chosen}; {gpu.clusters_missing}"
    return chosen
