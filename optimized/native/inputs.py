"""What the native operators do to their inputs before they pass pointers on.

They compute in fp32 on contiguous memory: fp16 and bf16 are converted, views are copied. fp64 runs through the
torch implementation, because its purpose is to be a yardstick, not to be fast. Letters as in `optimized.ops`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimized.native.build import call
from optimized.ops.backend import (
    MAX_CHUNK_ROWS,
    compute_dtype,
    implementation,
    row_chunks,
    split_finite,
    visible_keys,
)

# Rows that vectors are loaded from are this many floats or a multiple of it: the widest vector of all CPUs.
ALIGNMENT = 16


def needs_fp64(*tensors: Tensor) -> bool:
    """Whether the computation is one in fp64."""
    return compute_dtype(*(tensor.dtype for tensor in tensors)) == torch.float64


def through_torch(operator: str, *arguments: Any, **options: Any) -> Any:
    """The torch implementation's result."""
    return implementation(operator, "torch", torch.device("cpu"))(*arguments, **options)


def packed32(tensor: Tensor) -> Tensor:
    """As contiguous fp32, itself if it is."""
    return tensor.detach().to(torch.float32).contiguous()


def padded(width: int) -> int:
    """The next multiple of ALIGNMENT."""
    return width + -width % ALIGNMENT


def padded32(tensor: Tensor) -> Tensor:
    """As contiguous fp32 with zeros up to a multiple of ALIGNMENT in the last axis."""
    width = tensor.shape[-1]
    return pad(packed32(tensor), (0, padded(width) - width)) if width % ALIGNMENT else packed32(tensor)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no element of any tensor is infinite or NaN."""
    return all(call("all_finite", x, x.numel()) for x in map(packed32, tensors))


def slots32(bounds_BL2: Tensor) -> Tensor:
    """Bounds or indices as contiguous int32, itself if it is."""
    return bounds_BL2.to(torch.int32).contiguous()


def clean(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """(tensor, None) if all of it is finite, else `split_finite` of it in fp32."""
    return (tensor, None) if all_finite(tensor) else split_finite(packed32(tensor))


def mark_rows_(product_BLHX: Tensor, bad_BSHX: Tensor | None, bounds_BL2: Tensor, indices_BLK: Tensor | None) -> None:
    """Puts NaN, in place, where a row's sum over keys runs over one of the visible entries marked in `bad_BSHX`."""
    if bad_BSHX is None:
        return
    for chunk in row_chunks(bounds_BL2, MAX_CHUNK_ROWS):
        b, first, last, low, high = chunk
        visible_Cn = visible_keys(bounds_BL2, indices_BLK, chunk).to(bad_BSHX.dtype)
        reached_CHX = torch.einsum("cn,nhx->chx", visible_Cn, bad_BSHX[b, low:high]) > 0
        product_BLHX[b, first:last].masked_fill_(reached_CHX, math.nan)


def mark_keys_(product_BSHX: Tensor, bad_BLHX: Tensor | None, bounds_BL2: Tensor, indices_BLK: Tensor | None) -> None:
    """Puts NaN, in place, where a key's sum over rows runs over an entry marked in `bad_BLHX` of a row that sees it."""
    if bad_BLHX is None:
        return
    for chunk in row_chunks(bounds_BL2, MAX_CHUNK_ROWS):
        b, first, last, low, high = chunk
        visible_Cn = visible_keys(bounds_BL2, indices_BLK, chunk).to(bad_BLHX.dtype)
        reached_nHX = torch.einsum("cn,chx->nhx", visible_Cn, bad_BLHX[b, first:last]) > 0
        product_BSHX[b, low:high].masked_fill_(reached_nHX, math.nan)
