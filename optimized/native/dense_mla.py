"""The native `dense_mla`; see `optimized.ops.dense_mla` for its contract and dense_mla.cpp for its plan.

Products over keys hide some of them by a weight of 0, so they are given 0 for what is not finite, and NaN is put
where such an entry is visible, as in the torch implementation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.native.build import call
from optimized.native.inputs import clean, mark_keys_, mark_rows_, needs_fp64, packed32, padded, slots32, through_torch
from optimized.ops.backend import register, without_autocast


@register("dense_mla", "native")
def _dense_mla_native(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = (q_BLHD, k_BSHD, v_BSHV)
    if needs_fp64(*inputs):
        out_BLHV, lse_BLH = through_torch("dense_mla", *inputs, bounds_BL2, scale, indices_BLK)
    else:
        out_BLHV, lse_BLH = _DenseMla.apply(*inputs, bounds_BL2, scale, indices_BLK)
    return out_BLHV, lse_BLH


def _heads_first(x_BSHY: Tensor) -> Tensor:
    """Contiguous fp32 [B, H, S, Y]: a head's keys follow one another."""
    return packed32(x_BSHY.transpose(1, 2))


def _sizes(q_BLHD: Tensor, v_BSHV: Tensor, indices_BLK: Tensor | None) -> tuple[int, ...]:
    """B, L, S, K, H, D, V."""
    B, L, H, D = q_BLHD.shape
    return B, L, v_BSHV.shape[1], 0 if indices_BLK is None else indices_BLK.shape[-1], H, D, v_BSHV.shape[-1]


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
        sizes = B, L, _, _, H, _, V = _sizes(q_BLHD, v_BSHV, indices_BLK)
        out_BLHV, lse_BLH = torch.empty(B, L, H, V), torch.empty(B, L, H)
        clean_v_BSHV, bad_v_BSHV = clean(v_BSHV)
        call(
            "dense_mla_forward", packed32(q_BLHD), _heads_first(k_BSHD), _heads_first(clean_v_BSHV),
            slots32(bounds_BL2), None if indices_BLK is None else slots32(indices_BLK), float(scale),
            *sizes, out_BLHV, lse_BLH,
        )  # fmt: skip
        mark_rows_(out_BLHV, bad_v_BSHV, bounds_BL2, indices_BLK)
        ctx.save_for_backward(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK, lse_BLH)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV.to(q_BLHD.dtype), lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None, None
        with without_autocast(dout_BLHV.device):
            dq_BLHD, dk_BSHD, dv_BSHV = _backward(dout_BLHV, ctx.saved_tensors, ctx.scale)
        return dq_BLHD, dk_BSHD, dv_BSHV, None, None, None


def _backward(dout_BLHV: Tensor, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, ...]:
    q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK, lse_BLH = saved
    sizes = B, L, S, _, H, D, V = _sizes(q_BLHD, v_BSHV, indices_BLK)
    dq_BLHD = torch.empty(B, L, H, D)
    # Shorter than they are named: the gradients' rows are padded to whole vectors.
    dk_BHSD, dv_BHSV = torch.zeros(B, H, S, padded(D)), torch.zeros(B, H, S, padded(V))
    key_BHSD = _heads_first(k_BSHD)
    clean_k_BSHD, bad_k_BSHD = clean(k_BSHD)
    clean_key_BHSD = key_BHSD if bad_k_BSHD is None else _heads_first(clean_k_BSHD)
    call(
        "dense_mla_backward", packed32(q_BLHD), key_BHSD, clean_key_BHSD, _heads_first(v_BSHV),
        slots32(bounds_BL2), None if indices_BLK is None else slots32(indices_BLK), lse_BLH, packed32(dout_BLHV),
        float(scale), *sizes, dq_BLHD, dk_BHSD, dv_BHSV,
    )  # fmt: skip
    dk_BSHD, dv_BSHV = dk_BHSD[..., :D].transpose(1, 2), dv_BHSV[..., :V].transpose(1, 2)
    mark_rows_(dq_BLHD, bad_k_BSHD, bounds_BL2, indices_BLK)
    mark_keys_(dv_BSHV, clean(dout_BLHV)[1], bounds_BL2, indices_BLK)
    return dq_BLHD.to(q_BLHD.dtype), dk_BSHD.to(k_BSHD.dtype), dv_BSHV.to(v_BSHV.dtype)
