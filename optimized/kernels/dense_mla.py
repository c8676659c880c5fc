"""Attention over all visible keys in Triton: the operator's autograd Function. Kernels are in the modules beside it.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, K selected keys, W words
of 32 bits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.kernels.common import check_runnable
from optimized.kernels.dense_mla_backward import backward
from optimized.kernels.dense_mla_forward import forward, selection_bits
from optimized.ops.backend import register


@register("dense_mla", "triton")
def _dense_mla_triton(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_runnable("dense_mla", q_BLHD, k_BSHD, v_BSHV)
    out_BLHV, lse_BLH = _DenseMla.apply(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, scale, indices_BLK)
    return out_BLHV, lse_BLH


def _operands(
    q_BLHD: Tensor, k_BSHD: Tensor, v_BSHV: Tensor, bounds_BL2: Tensor, indices_BLK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs as kernels take them: contiguous, q, k and v of one dtype, int32 bounds, the selection as bits.

    The bits are made again for the backward pass rather than kept: they take 1/8 byte a pair, the indices 4 K a row.
    """
    dtype = torch.promote_types(torch.promote_types(q_BLHD.dtype, k_BSHD.dtype), v_BSHV.dtype)
    q_BLHD, k_BSHD, v_BSHV = (x.to(dtype).contiguous() for x in (q_BLHD, k_BSHD, v_BSHV))
    bits_BLW = None
    if indices_BLK is not None:
        bits_BLW = selection_bits(indices_BLK.to(torch.int32).contiguous(), k_BSHD.shape[1])
    return q_BLHD, k_BSHD, v_BSHV, bounds_BL2.to(torch.int32).contiguous(), bits_BLW


class _DenseMla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BLHD: Tensor,
        k_BSHD: Tensor,
        v_BSHV: Tensor,
        bounds_BL2: Tensor,
        scale: float,
        indices_BLK: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        # Triton launches on the current device, whatever tensors it is given.
        with torch.cuda.device_of(q_BLHD):
            out_BLHV, lse_BLH = forward(*_operands(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK), scale)
        out_BLHV = out_BLHV.to(q_BLHD.dtype)
        ctx.save_for_backward(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK, out_BLHV, lse_BLH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV, lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None, None
        *inputs, out_BLHV, lse_BLH = ctx.saved_tensors
        needs_dkv = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        with torch.cuda.device_of(dout_BLHV):
            operands = _operands(*inputs)
            dout_BLHV, out_BLHV = (x.to(operands[0].dtype).contiguous() for x in (dout_BLHV, out_BLHV))
            gradients = backward(dout_BLHV, *operands, out_BLHV, lse_BLH, ctx.scale, needs_dkv)
        dq, dk, dv = (None if dx is None else dx.to(x.dtype) for dx, x in zip(gradients, inputs[:3], strict=True))
        return dq, dk, dv, None, None, None
