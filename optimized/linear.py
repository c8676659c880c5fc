"""Linear layers by the matrix library that is fast on this processor.

torch multiplies fp32 matrices on a CPU by its BLAS. Where that is MKL and the processor is not Intel's, MKL takes a path
of half the vector width (measured on an AMD Zen 5 core: 100 of 256 GFLOP/s, where oneDNN, which torch ships too,
reaches 229 to 250 forward and 146 to 201 in a weight's gradient). There these layers go through oneDNN.

Letters: * any number of axes, M width of the input, F width of the output, N rows, P rows sorted by group, X groups.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LinearImplementation = Literal["onednn", "blas"]


@cache
def _mkl_is_slow() -> bool:
    """Whether torch's BLAS is MKL, on a processor of another maker, and oneDNN is there."""
    onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (onednn and torch.backends.mkl.is_available()):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "AuthenticAMD" in processor


def linear_implementation(device: torch.device, dtype: torch.dtype) -> LinearImplementation:
    """What multiplies matrices of `dtype` on `device`."""
    return "onednn" if device.type == "cpu" and dtype == torch.float32 and _mkl_is_slow() else "blas"


def _product(x_PM: Tensor, w_FM: Tensor) -> Tensor:
    """x · wᵀ by oneDNN; either may be a transposed view."""
    y_PF: Tensor = torch.ops.mkldnn._linear_pointwise(x_PM, w_FM, None, "none", [], "")
    return y_PF


class Linear(nn.Linear):
    """nn.Linear with the product of `linear_implementation`: what a model's linear layers become."""

    def forward(self, x: Tensor) -> Tensor:
        """`[*, F]`, as nn.Linear's."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[*, F]`, as F.linear's, by the product of `linear_implementation`."""
    plain = (
        bias is not None
        or x.dtype != weight.dtype
        or linear_implementation(weight.device, weight.dtype) == "blas"
        or x.numel() == 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    )
    if plain:
        return F.linear(x, weight, bias)
    y: Tensor = _OneDnnLinear.apply(x.flatten(0, -2), weight)
    return y.unflatten(0, x.shape[:-1])


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PM: Tensor, w_FM: Tensor) -> Tensor:
        ctx.save_for_backward(x_PM, w_FM)
        return _product(x_PM, w_FM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_PM, w_FM = ctx.saved_tensors
        dx_PM = _product(dy_PF, w_FM.T) if ctx.needs_input_grad[0] else None
        dw_FM = _product(dy_PF.T, x_PM.T) if ctx.needs_input_grad[1] else None
        return dx_PM, dw_FM


def grouped_linear(x_NM: Tensor, rows_P: Tensor, w_XFM: Tensor, counts_X: Tensor) -> Tensor:
    """Rows `rows_P` of x, those of group i times w[i]ᵀ, `[P, F]`: the first counts[0] are group 0's, and so on.

    One grouped product of torch's, or one of oneDNN's a group, by `linear_implementation`.
    """
    if linear_implementation(x_NM.device, x_NM.dtype) == "blas":
        return F.grouped_mm(x_NM[rows_P], w_XFM.mT, offs=counts_X.cumsum(0).to(torch.int32))
    y_PF: Tensor = _OneDnnGroups.apply(x_NM, rows_P, w_XFM, tuple(counts_X.tolist()))
    return y_PF


class _OneDnnGroups(torch.autograd.Function):
    """Gathers a group's rows when it comes to them, in both directions: all groups' rows are never held at once."""

    @staticmethod
    def forward(ctx: Any, x_NM: Tensor, rows_P: Tensor, w_XFM: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x_NM, rows_P, w_XFM)
        ctx.counts = counts
        y_PF = x_NM.new_empty(len(rows_P), w_XFM.shape[1])
        for y, rows, w_FM in zip(y_PF.split(counts), rows_P.split(counts), w_XFM, strict=True):
            if len(rows):
                y.copy_(_product(x_NM[rows], w_FM))
        return y_PF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PF: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x_NM, rows_P, w_XFM = ctx.saved_tensors
        dx_NM = torch.zeros_like(x_NM) if ctx.needs_input_grad[0] else None
        dw_XFM = torch.zeros_like(w_XFM) if ctx.needs_input_grad[2] else None
        for i, (dy, rows) in enumerate(zip(dy_PF.split(ctx.counts), rows_P.split(ctx.counts), strict=True)):
            if len(rows) and dx_NM is not None:
                dx_NM.index_add_(0, rows, _product(dy, w_XFM[i].T))
            if len(rows) and dw_XFM is not None:
                dw_XFM[i] = _product(dy.T, x_NM[rows].T)
        return dx_NM, None, dw_XFM, None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer and nothing more: no adapter, no hook that moves its weight."""
    return type(module) in (nn.Linear, Linear) and not hasattr(module, "_hf_hook")
