"""RMSNorm that keeps its input and one number a row for the backward, where autograd would keep the normed rows as well.

    n = x · r      r = 1 / sqrt(mean(x²) + eps)      y = n · w      dx = r (g − n · mean(g · n)), g = dy · w      dw = Σ dy · n

Letters: * any number of axes, M width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.moe import RMSNorm as ReferenceRMSNorm
from reference.precision import at_least_fp32


class RMSNorm(ReferenceRMSNorm):
    """The reference's norm, the same bits forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight_M: Tensor, eps: float) -> Tensor:
    """x · r · w in at least fp32, rounded once, to the shape and dtype of `x`."""
    y: Tensor = _RmsNorm.apply(x, weight_M, eps)
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_M: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_M, rstd)
        return (wide * rstd * weight_M.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_M, rstd = ctx.saved_tensors
        normed = at_least_fp32(x) * rstd
        dy = dy.to(normed.dtype)
        dx = dw_M = None
        if ctx.needs_input_grad[1]:
            dw_M = (dy * normed).flatten(0, -2).sum(0).to(weight_M.dtype)
        if ctx.needs_input_grad[0]:
            g = dy * weight_M.to(normed.dtype)
            mean = (g * normed).mean(-1, keepdim=True)
            dx = (g.sub_(normed.mul_(mean)).mul_(rstd)).to(x.dtype)
        return dx, dw_M, None
