"""The Hadamard rotation before FP8: x · H · D^(-1/2) over the last axis (spec 2.6).

By fast-hadamard-transform where that is installed and the tensor is on a GPU, else by the butterfly: log2 D rounds of
sums and differences of pairs, in at least fp32. H is symmetric and the rotation orthonormal, so it is its own gradient.

Letters: D width of a head, a power of two; * any number of axes.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from optimized.ops.backend import opaque

HadamardImplementation = Literal["fast-hadamard-transform", "butterfly"]


def hadamard_implementation(device: torch.device) -> HadamardImplementation:
    """What `hadamard` uses for tensors on `device`."""
    if device.type == "cuda" and find_spec("fast_hadamard_transform") is not None:
        return "fast-hadamard-transform"
    return "butterfly"


@opaque
def hadamard(x: Tensor) -> Tensor:
    """`x` `[*, D]` rotated by Sylvester's Hadamard matrix times D^(-1/2), in x's dtype; differentiable.

    Raises:
        ValueError: D is not a power of two.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard: x has {width} channels; it must have a power of two.")
    rotated: Tensor = _Hadamard.apply(x)
    return rotated


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - the signature is autograd's
        return _rotate(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return _rotate(grads[0])


def _rotate(x: Tensor) -> Tensor:
    scale = x.shape[-1] ** -0.5
    if hadamard_implementation(x.device) == "fast-hadamard-transform":
        from fast_hadamard_transform import hadamard_transform

        turned: Tensor = hadamard_transform(x.contiguous(), scale=scale)
        return turned
    return (butterfly(x if x.dtype == torch.float64 else x.float()) * scale).to(x.dtype)


def butterfly(x: Tensor) -> Tensor:
    """`x` `[*, D]` times Sylvester's matrix of ±1, not scaled, in x's dtype."""
    width, half = x.shape[-1], 1
    while half < width:
        pairs = x.unflatten(-1, (width // (2 * half), 2, half))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return x
