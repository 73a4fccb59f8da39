"""Whether tensors have the memory that their sizes promise."""

from torch import Tensor


def expect_storage(*named: tuple[str, Tensor | None]) -> None:
    """A storage can be freed or shrunk below its tensors, as FSDP does with weights that other processes hold.

    Raises:
        RuntimeError: that of a tensor has been, with torch's own sentence, and the tensor's name before it.
    """
    for name, tensor in named:
        if tensor is None or tensor.numel() == 0:
            continue
        sizes, strides = list(tensor.shape), list(tensor.stride())
        last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        needed, available = (last + 1) * tensor.itemsize, tensor.untyped_storage().nbytes()
        if needed > available:
            raise RuntimeError(
                f"{name}: sizes {sizes} and strides {strides} requiring a storage size of {needed} are out of bounds "
                f"for storage of size {available}"
            )
