"""The operator pair by Triton kernels: `host` says when and how they are launched, `kernels` what they compute."""

from seqkernels.backends.triton.host import backward, forward

__all__ = ["backward", "forward"]
