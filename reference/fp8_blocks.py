"""Weights in FP8: one e4m3 payload and one fp32 scale for each block of 128×128 (spec 4.2).

    weight = payload · weight_scale_inv        (the multiplier, despite its name)

The product is taken in fp32, as the official conversion does. Edge blocks are smaller: 576 rows are 5 blocks, the
last of 64. With a power of two as scale the product is exact in bf16 too: e4m3 has 4 significant bits, bf16 has 8.

Letters: O rows (outputs), I columns (inputs), P and Q their blocks.
"""

import torch

from .fp8 import BLOCK, E4M3_MAX

# Smallest positive e4m3 value, a subnormal.
E4M3_SMALLEST = 2.0**-9
# 448 = 0.875 · 2^9, in the form of torch.frexp.
_MAX_MANTISSA, _MAX_EXPONENT = 0.875, 9
# Below it a power of two is subnormal in fp32, and lost where subnormals are flushed.
_MIN_EXPONENT = -126


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """`[P, Q]`, the blocks of a weight of `shape` `[O, I]`, edge blocks included."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def check_scale(name: str, scale_PQ: torch.Tensor) -> None:
    """Refuse scales that no quantiser writes.

    Raises:
        ValueError: the first scale that is NaN, infinite, zero or negative, by its place in the tensor called `name`.
    """
    wrong_PQ = ~(scale_PQ.isfinite() & (scale_PQ > 0))
    if bool(wrong_PQ.any()):
        row, column = (int(i) for i in wrong_PQ.nonzero()[0])
        raise ValueError(
            f"Scale {name!r} holds {float(scale_PQ[row, column])} at block [{row}, {column}]; scales must be finite and above 0."
        )


def is_exact(scale_PQ: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `dtype` holds every product of an e4m3 number and these scales as fp32 does."""
    if dtype in (torch.float32, torch.float64):
        return True
    mantissa, _ = torch.frexp(scale_PQ)
    info = torch.finfo(dtype)
    smallest, largest = float(scale_PQ.min()) * E4M3_SMALLEST, float(scale_PQ.max()) * E4M3_MAX
    return bool((mantissa == 0.5).all()) and smallest >= info.tiny and largest <= info.max


def dequantize_blocks(payload_OI: torch.Tensor, scale_PQ: torch.Tensor, out_OI: torch.Tensor) -> torch.Tensor:
    """`out_OI` = payload · its block's scale: multiplied in fp32, then rounded once to the dtype of `out_OI`.

    Args:
        payload_OI: float8_e4m3fn. scale_PQ: fp32, of `scale_shape(payload_OI.shape)`; both on the device of `out_OI`.
    """
    width = payload_OI.shape[1]
    # A row of blocks at a time: no more than 128·I numbers in fp32 beside the result.
    for p, row in enumerate(range(0, payload_OI.shape[0], BLOCK)):
        scale_I = scale_PQ[p].repeat_interleave(BLOCK)[:width]
        out_OI[row : row + BLOCK] = payload_OI[row : row + BLOCK].float() * scale_I
    return out_OI


def quantize_blocks(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload `[O, I]` in float8_e4m3fn and power-of-two scales `[P, Q]` in fp32 (`scale_fmt` ue8m0).

    A block's scale is the smallest power of two, of at least 2^-126, that brings its largest magnitude to 448 or
    below. It is never above the scale that a block was dequantised with, so that numbers which come from FP8 with
    powers of two as scales survive bit for bit. A block of zeros has the scale 1.

    Raises:
        ValueError: the weight holds NaN or an infinity.
    """
    rows, columns = weight_OI.shape
    payload_OI = torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn)
    scale_PQ = torch.empty(scale_shape((rows, columns)), dtype=torch.float32, device=weight_OI.device)
    for p, row in enumerate(range(0, rows, BLOCK)):
        wide_OI = weight_OI[row : row + BLOCK].float()
        padded_OI = torch.nn.functional.pad(wide_OI.abs(), (0, -columns % BLOCK))
        amax_Q = padded_OI.unflatten(1, (-1, BLOCK)).amax((0, 2))
        if not bool(amax_Q.isfinite().all()):
            raise ValueError("A weight that is to be quantised holds NaN or an infinity.")
        mantissa_Q, exponent_Q = torch.frexp(amax_Q)
        exponent_Q = (exponent_Q - _MAX_EXPONENT + (mantissa_Q > _MAX_MANTISSA)).clamp_min(_MIN_EXPONENT)
        # By its bits: a power function may be an ulp off.
        power_Q = ((exponent_Q.int() + 127) << 23).view(torch.float32)
        scale_PQ[p] = torch.where(amax_Q > 0, power_Q, 1.0)
        scaled_OI = wide_OI / scale_PQ[p].repeat_interleave(BLOCK)[:columns]
        payload_OI[row : row + BLOCK] = scaled_OI.to(torch.float8_e4m3fn)
    return payload_OI, scale_PQ
