"""The namespace of the operators: in Python, this is its one home (csrc/names.h is that in C++).

In a Hugging Face kernel, where several versions share a process, a generated file of these names takes its place.
"""

import torch

ops = torch.ops.seqkernels


def add_op_namespace_prefix(name: str) -> str:
    return f"seqkernels::{name}"
