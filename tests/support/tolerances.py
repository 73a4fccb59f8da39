"""What decides that a result is right: its error against the float64 specification, beside torch.nn's own error."""

import torch
from torch import Tensor


def errors(value: Tensor, spec: Tensor) -> tuple[float, float]:
    """Relative error in the Euclidean norm, and in the maximum norm, so that one bad row cannot hide."""
    value, spec = value.detach().double(), spec.detach().double()
    assert value.shape == spec.shape, f"shape {tuple(value.shape)}, specified {tuple(spec.shape)}"
    assert not value.isnan().any() or spec.isnan().any(), "NaN where the specification has none"
    if spec.numel() == 0:
        return 0.0, 0.0
    difference = value - spec
    scale, largest = spec.norm().item(), spec.abs().max().item()
    if scale == 0:
        return difference.norm().item(), difference.abs().max().item()
    return difference.norm().item() / scale, difference.abs().max().item() / largest


Results = dict[str, Tensor]


def floor_of(dtype: torch.dtype) -> float:
    """The error that any result may have: a few units of rounding."""
    return (16 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps


def assert_as_close_as_torch(ours: list[Results], torchs: list[Results], spec: list[Results], dtype) -> None:
    """Each of our tensors is at most twice as far from the specification as torch.nn's own, plus two units of rounding.

    The lists hold several draws of one configuration, which are measured together: where two large numbers nearly
    cancel, or a relu's input is a rounding error away from zero, a single error is large or small by chance, in
    torch.nn as in ours. In float64 the specification is rounded as often as ours (and in the order of torch.nn's sums),
    so there the floor is that of a long sum.
    """
    floor = floor_of(dtype)
    for name in spec[0]:
        assert all(results[name].dtype == dtype for results in ours), f"{name} is not {dtype}"
        value, own, right = (
            torch.cat([results[name].detach().double().flatten() for results in draws])
            for draws in (ours, torchs, spec)
        )
        (error, largest), (own_error, own_largest) = errors(value, right), errors(own, right)
        assert error <= 2 * own_error + floor, f"{name}: error {error:.2e}, torch.nn's own {own_error:.2e}"
        # A guard, so that one bad row cannot hide in a large tensor.
        assert largest <= 2 * (2 * own_largest + floor), f"{name}: at worst {largest:.2e}, torch.nn's {own_largest:.2e}"


def assert_typically_as_close_as_torch(
    ours: list[Results], torchs: list[Results], spec: list[Results], dtype: torch.dtype
) -> None:
    """The same bounds, on the geometric mean of the draws' ratios, where an error is enlarged by a few in one draw: a
    norm divides by a small deviation, in torch's loop as in ours. What is systematic shows in all draws."""
    floor = floor_of(dtype)
    for name in spec[0]:
        assert all(results[name].dtype == dtype for results in ours), f"{name} is not {dtype}"
        error, own = (
            torch.tensor([errors(draw[name], right[name]) for draw, right in zip(draws, spec, strict=True)]).double()
            for draws in (ours, torchs)
        )
        found = f"{name}: error and largest error of each draw {error.tolist()}, torch's own {own.tolist()}"
        ratio, of_largest = ((error + floor * torch.tensor([1, 2])) / (own + floor)).log().mean(0).exp()
        assert ratio <= 2, found
        # Two guards: no bad row hides in a large tensor, nor a bad draw among others.
        assert of_largest <= 4, found
        assert error[:, 1].max() <= 16 * (own[:, 1].max() + floor), found
