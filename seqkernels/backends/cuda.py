"""The operator pair by CUDA kernels (csrc/cuda): NVIDIA GPUs, in every dtype.

Four paths, chosen by `select.path`: *single CTA*, one launch in which a block of threads takes up to 8 sequences
through all steps with the recurrent weights in its registers and shared memory; *cluster*, the same by up to 16 blocks
that share the hidden units and push new states to each other; *persistent grid*, the same by as many blocks as run at the
same time, which exchange through the L2 cache; and *stepwise*, for each step a cuBLAS product and a kernel. Nothing
waits for the GPU, so all of them can be captured in a CUDA graph.

float32 products follow torch's switches: those inside the kernels torch.backends.cudnn.rnn, as nn.GRU's do; those that
cuBLAS multiplies torch.backends.cuda.matmul.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import hardware, select
from seqkernels.backends import GATES


def forward(
    cell: str,
    x: Tensor,  # [N, I]
    weights: list[Tensor],
    h_0: Tensor,  # [D, B, P]
    c_0: Tensor | None,  # [D, B, H]
    batch_sizes: Tensor | None,  # [T]
    save: bool,
    launch: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = _path(cell, x, weights, h_0, backward=False)
    return torch.ops.seqkernels.cuda_forward(cell, x, weights, h_0, c_0, batch_sizes, save, *path)


def backward(
    cell: str,
    grad_y: Tensor | None,  # [N, D*P]
    grad_h_n: Tensor | None,  # [D, B, P]
    grad_c_n: Tensor | None,  # [D, B, H]
    x: Tensor,
    weights: list[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,  # [N, D*P]
    saved: Tensor,  # [N, D, K*H]
    wants_x: bool,
    wants_weights: bool,
    launch: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    path = _path(cell, x, weights, h_0, backward=True)
    return torch.ops.seqkernels.cuda_backward(
        cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, *path
    )


def _path(cell: str, x: Tensor, weights: list[Tensor], h_0: Tensor, backward: bool) -> tuple:
    """Whether float32 factors may be rounded to TF32, and the path."""
    tf32, gpu = x.dtype == torch.float32 and hardware.tf32(x.device), hardware.gpu_of(x.device)
    told = h_0.dim() == 3 and len(weights) > 1 and weights[0].dim() == 2 and cell in GATES
    hidden_size = weights[0].shape[0] // GATES[cell] if told else 0
    if not hidden_size or not h_0.shape[0]:
        return False, 0, 0, 0  # the operator says what is wrong
    projected = len(weights) // h_0.shape[0] % 2 == 1
    path, _ = select.path(cell, hidden_size, projected, x.dtype, tf32, gpu, backward, *h_0.shape[:2])
    return tf32, ("stepwise", "single CTA", "cluster", "persistent grid").index(path.name), path.tile, path.units
