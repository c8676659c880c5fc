"""Where the model leaves its own dtype: at least fp32, and never less because of autocast.

The specification runs in fp64 when asked, so that it is its own oracle. An upcast is therefore
"at least fp32" and never "to fp32".
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

P = ParamSpec("P")
T = TypeVar("T")


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or unchanged when it is fp64 already."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with autocast off, on the device of its first tensor argument.

    Autocast turns fp32 matrix products into bf16 ones. Index scores, the gate and the softmax are
    specified in at least fp32 and their choices are discrete, so they are not up for that.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(tensor.device.type):
            return function(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


class WideLinear(nn.Linear):
    """A linear layer without bias that computes and answers in at least fp32, whatever dtype it is stored in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[*, out]` in at least fp32."""
        return wide_linear(x, self.weight)


class WideLayerNorm(nn.LayerNorm):
    """A layer norm that computes and answers in at least fp32, and keeps its parameters so in a model in bf16.

    It is the index keys' (spec 2, step 4): rounded, its weight and bias alone change which keys a quarter of the rows
    of `tiny` choose.
    """

    def __init__(self, width: int, eps: float) -> None:
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        super().__init__(width, eps=eps, dtype=wide)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "WideLayerNorm":
        # `model.to(bfloat16)` comes through here.
        super()._apply(lambda held: _not_rounded(held, fn(held)), recurse)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape of `x`, in at least fp32."""
        x = at_least_fp32(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _not_rounded(held: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """`moved`, or `held` on its device in fp32 where `moved` has fewer bits and `held` has not."""
    return held.to(moved.device, torch.float32) if moved.dtype.itemsize < 4 <= held.dtype.itemsize else moved


@without_autocast
def wide_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·Wᵀ in at least fp32, both operands cast."""
    x = at_least_fp32(x)
    return F.linear(x, weight.to(x.dtype))
