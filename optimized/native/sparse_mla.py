"""The native `sparse_mla`; see `optimized.ops.sparse_mla` for its contract and sparse_mla.cpp for its plan."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.native.build import call
from optimized.native.inputs import needs_fp64, packed32, padded32, slots32, through_torch
from optimized.ops.backend import register, without_autocast


@register("sparse_mla", "native")
def _sparse_mla_native(
    q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor, scale: float, d_v: int, *, deterministic: bool
) -> tuple[Tensor, Tensor]:
    if needs_fp64(q_BLHD, kv_BSD):
        out_BLHV, lse_BLH = through_torch(
            "sparse_mla", q_BLHD, kv_BSD, indices_BLK, scale, d_v, deterministic=deterministic
        )
    else:
        out_BLHV, lse_BLH = _SparseMla.apply(q_BLHD, kv_BSD, indices_BLK, scale, d_v)
    return out_BLHV, lse_BLH


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor, scale: float, d_v: int
    ) -> tuple[Tensor, Tensor]:
        (B, L, H, D), S, K = q_BLHD.shape, kv_BSD.shape[1], indices_BLK.shape[-1]
        out_BLHV = torch.empty(B, L, H, d_v)
        lse_BLH = torch.empty(B, L, H)
        # Shorter than they are named: kv's rows are padded to whole vectors.
        kv = padded32(kv_BSD)
        call(
            "sparse_mla_forward", packed32(q_BLHD), kv, slots32(indices_BLK), float(scale),
            B, L, S, K, H, D, d_v, kv.shape[-1], out_BLHV, lse_BLH,
        )  # fmt: skip
        ctx.save_for_backward(q_BLHD, kv_BSD, indices_BLK, lse_BLH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV.to(q_BLHD.dtype), lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None
        q_BLHD, kv_BSD, indices_BLK, lse_BLH = ctx.saved_tensors
        (B, L, H, D), S, K = q_BLHD.shape, kv_BSD.shape[1], indices_BLK.shape[-1]
        needs_dq, needs_dkv = ctx.needs_input_grad[:2]
        with without_autocast(dout_BLHV.device):
            kv = padded32(kv_BSD)
            dq_BLHD = torch.empty(B, L, H, D) if needs_dq else None
            dkv = torch.zeros_like(kv) if needs_dkv else None
            call(
                "sparse_mla_backward", packed32(q_BLHD), kv, slots32(indices_BLK), lse_BLH, packed32(dout_BLHV),
                float(ctx.scale), B, L, S, K, H, D, dout_BLHV.shape[-1], kv.shape[-1], dq_BLHD, dkv,
            )  # fmt: skip
            return (
                None if dq_BLHD is None else dq_BLHD.to(q_BLHD.dtype),
                None if dkv is None else dkv[..., :D].to(kv_BSD.dtype),
                None,
                None,
                None,
            )
