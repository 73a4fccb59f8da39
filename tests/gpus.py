"""GPUs that are not here, as `hardware.gpu_of` would describe them (sources: the vendors' data sheets, and the CUDA
programming guide's table of shared memory a block may have)."""

from seqkernels.hardware import GPU

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("NVIDIA A100-SXM4-80GB", "sm_80", 163 << 10, 108, 80 << 30),
        GPU("NVIDIA L4", "sm_89", 99 << 10, 58, 24 << 30),
        GPU("NVIDIA GeForce RTX 4060 Laptop GPU", "sm_89", 99 << 10, 24, 8 << 30),
        GPU("NVIDIA H200", "sm_90", 227 << 10, 132, 141 << 30),
        GPU("NVIDIA B200", "sm_100", 227 << 10, 148, 180 << 30),
        GPU("AMD Instinct MI300X", "gfx942", 64 << 10, 304, 192 << 30),
        GPU("Tesla T4", "sm_75", 64 << 10, 40, 16 << 30),
    )
}
