"""GPUs that are not here, as `hardware.gpu_of` would describe them (sources: the vendors' data sheets, and the CUDA
programming guide's table of shared memory a block may have)."""

from seqkernels.hardware import GPU


def clusters_of(*groups: int) -> tuple[int, ...]:
    """How many clusters of 1 to 16 blocks run at the same time on GPCs of these sizes; a cluster is in
    one GPC."""
    return tuple(sum(group // blocks for group in groups) for blocks in range(1, 17))


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("NVIDIA A100-SXM4-80GB", "sm_80", 163 << 10, 108),
        GPU("NVIDIA L4", "sm_89", 99 << 10, 58),
        GPU("NVIDIA GeForce RTX 4060 Laptop GPU", "sm_89", 99 << 10, 24),
        # The sizes of GPCs differ from one GPU to the next. On an H100, which is as large, clusters of 16 reached 112
        # of 132 multiprocessors (Luehnen, HPEC 2024), and clusters of 8 reached 120, as they do with these sizes. Those
        # of Blackwell are made up.
        GPU("NVIDIA H200", "sm_90", 227 << 10, 132, None, clusters_of(18, 18, 18, 16, 16, 16, 16, 14)),
        GPU("NVIDIA B200", "sm_100", 227 << 10, 148, None, clusters_of(20, 20, 18, 18, 18, 18, 18, 18)),
        GPU("AMD Instinct MI300X", "gfx942", 64 << 10, 304),
        GPU("Tesla T4", "sm_75", 64 << 10, 40),
    )
}

# A seventh of an H200. Small instances have smaller clusters (CUDA programming guide). That 7 blocks are the most is
# made up, so that tests have a GPU without the larger clusters.
MIG = GPU("NVIDIA H200 MIG 1g.18gb", "sm_90", 227 << 10, 16, None, (*clusters_of(16)[:7], *(9 * (0,))))

# Compute capability 12.0: clusters of up to 8 blocks, as 16 are for a B200 (Blackwell tuning guide).
RTX_5090 = GPU("NVIDIA GeForce RTX 5090", "sm_120", 99 << 10, 170, None, clusters_of(*(5 * [16]), *(6 * [15]))[:8])
RTX_PRO_6000 = GPU("NVIDIA RTX PRO 6000", "sm_120", 99 << 10, 188, None, clusters_of(*(8 * [16]), *(4 * [15]))[:8])
