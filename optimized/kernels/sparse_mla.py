"""Attention over the selected keys in Triton: the operator's autograd Function. Kernels are in the modules beside it.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width (= first d_v columns of
the latent), K selected keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.kernels.common import check_runnable
from optimized.kernels.sparse_mla_backward import backward
from optimized.kernels.sparse_mla_forward import forward
from optimized.ops.backend import register


@register("sparse_mla", "triton")
def _sparse_mla_triton(
    q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor, scale: float, d_v: int, *, deterministic: bool
) -> tuple[Tensor, Tensor]:
    check_runnable("sparse_mla", q_BLHD, kv_BSD)
    out_BLHV, lse_BLH = _SparseMla.apply(q_BLHD, kv_BSD, indices_BLK, scale, d_v, deterministic)
    return out_BLHV, lse_BLH


def _operands(q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as kernels take them: contiguous, q and kv of one dtype, int32 indices."""
    dtype = torch.promote_types(q_BLHD.dtype, kv_BSD.dtype)
    return q_BLHD.to(dtype).contiguous(), kv_BSD.to(dtype).contiguous(), indices_BLK.to(torch.int32).contiguous()


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BLHD: Tensor,
        kv_BSD: Tensor,
        indices_BLK: Tensor,
        scale: float,
        d_v: int,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        # Triton launches on the current device, whatever tensors it is given.
        with torch.cuda.device_of(q_BLHD):
            out_BLHV, lse_BLH = forward(*_operands(q_BLHD, kv_BSD, indices_BLK), scale, d_v)
        out_BLHV = out_BLHV.to(q_BLHD.dtype)
        ctx.save_for_backward(q_BLHD, kv_BSD, indices_BLK, out_BLHV, lse_BLH)
        ctx.scale, ctx.deterministic = scale, deterministic
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV, lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None, None
        q_BLHD, kv_BSD, indices_BLK, out_BLHV, lse_BLH = ctx.saved_tensors
        query_BLHD, latent_BSD, slots_BLK = _operands(q_BLHD, kv_BSD, indices_BLK)
        dout_BLHV, out_BLHV = (x.to(query_BLHD.dtype).contiguous() for x in (dout_BLHV, out_BLHV))
        needs_dq, needs_dkv, *_ = ctx.needs_input_grad
        with torch.cuda.device_of(dout_BLHV):
            dq_BLHD, dkv_BSD = backward(
                dout_BLHV, query_BLHD, latent_BSD, slots_BLK, out_BLHV, lse_BLH, ctx.scale,
                needs_dq, needs_dkv, ctx.deterministic,
            )  # fmt: skip
        if dq_BLHD is not None:
            dq_BLHD = dq_BLHD.to(q_BLHD.dtype)
        return dq_BLHD, None if dkv_BSD is None else dkv_BSD.to(kv_BSD.dtype), None, None, None, None
