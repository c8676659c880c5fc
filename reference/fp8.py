"""The FP8 steps of the official inference path, simulated exactly (spec 1.4, 2.6-2.7, 4.2).

Quantise, dequantise: the values are those of the official bytes, the storage stays in the model's
dtype. Gradients are straight-through for the rounding and transposed for the Hadamard rotation.

Letters: D channels of one token; * any number of axes; block = 128 channels (or all of a narrower D).
"""

from typing import Any

import torch

from .precision import at_least_fp32

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
BLOCK = 128


def power_of_two_at_least(scale: torch.Tensor) -> torch.Tensor:
    """The ue8m0 rule: fp32 `scale` rounded up to a power of two by its bits (exponent, +1 if any mantissa bit)."""
    bits = scale.float().view(torch.int32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
    return (exponent << 23).view(torch.float32)


def quantize_e4m3(x: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-block e4m3 payload and ue8m0 scale of `x` `[*, D]`.

    a = max(amax, 1e-4); s = a / 448 rounded up to a power of two; payload = clamp(x / s, ±448).

    Returns:
        payload `[*, D]` in float8_e4m3fn and scale `[*, D / block]` in fp32. `block` shrinks to D when D is smaller.

    Raises:
        ValueError: D is neither below `block` nor a multiple of it.
    """
    width = x.shape[-1]
    block = min(block, width)
    if width % block:
        raise ValueError(f"quantize_e4m3: x has {width} channels; it must have a multiple of {block}.")
    blocks = x.float().unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR)
    scale = power_of_two_at_least(amax * (1.0 / E4M3_MAX))
    payload = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return payload.flatten(-2), scale.squeeze(-1)


def dequantize_e4m3(payload: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`payload` `[*, D]` times its block's `scale`, in `dtype`."""
    blocks = payload.to(torch.float32).unflatten(-1, (scale.shape[-1], -1))
    return (blocks * scale[..., None]).flatten(-2).to(dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: int) -> torch.Tensor:  # noqa: ARG004 - the signature is autograd's
        return dequantize_e4m3(*quantize_e4m3(x, block), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004
        return grads[0], None


def fp8_round_trip(x: torch.Tensor, block: int = BLOCK) -> torch.Tensor:
    """`x` as the official path reads it back from FP8, in x's dtype; the gradient passes straight through."""
    rounded: torch.Tensor = _StraightThrough.apply(x, block)
    return rounded


def hadamard_matrix(width: int, *, device: torch.device | None = None) -> torch.Tensor:
    """Sylvester's Hadamard matrix `[width, width]` of ±1 in fp32; `width` a power of two.

    Raises:
        ValueError: `width` is not a power of two.
    """
    if width < 1 or width & (width - 1):
        raise ValueError(f"hadamard_matrix: width is {width}; it must be a power of two.")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def hadamard_rotate(x: torch.Tensor) -> torch.Tensor:
    """x·H·D^(-1/2) over the last axis, in at least fp32, returned in x's dtype.

    Orthonormal and symmetric, so q·k is unchanged in exact arithmetic; it spreads outliers before FP8.
    """
    width = x.shape[-1]
    wide = at_least_fp32(x)
    matrix = hadamard_matrix(width, device=x.device).to(wide.dtype)
    return (wide @ matrix * width**-0.5).to(x.dtype)
