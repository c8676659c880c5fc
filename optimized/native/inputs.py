"""What the native operators do to their inputs before they pass pointers on.

They compute in fp32 on contiguous memory: fp16 and bf16 are converted, views are copied. fp64 runs through the
torch implementation, because its purpose is to be a yardstick, not to be fast. Letters as in `optimized.ops`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from optimized.native.build import call
from optimized.ops.backend import compute_dtype, implementation

# Rows that vectors are loaded from are this many floats or a multiple of it: the widest vector of all CPUs.
ALIGNMENT = 16


def needs_fp64(*tensors: Tensor) -> bool:
    """Whether the computation is one in fp64."""
    return compute_dtype(*(tensor.dtype for tensor in tensors)) == torch.float64


def through_torch(operator: str, *arguments: Any) -> Any:
    """The torch implementation's result."""
    return implementation(operator, "torch", torch.device("cpu"))(*arguments)


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
