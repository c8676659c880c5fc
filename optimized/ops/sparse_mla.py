"""Attention over the selected keys, absorbed form: all heads share one latent key (report eq. 2).

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width (= first d_v
columns of the latent), K selected keys, C queries in a chunk.

    z[t, h, i] = scale * q[t, h] . kv[idx[t, i]]     P = softmax of z over the valid i     out = P @ v

Nothing of size K is kept for the backward pass: it gathers and recomputes P chunk by chunk, then

    dP = dout . v     Delta = sum_i P dP     dS = scale * P (dP - Delta)
    dq = dS @ kv      dkv[idx] += dS' q, and P' dout in the first V columns

P is the softmax of z again, not exp(z - lse): rounding lse moves all weights of a row by the same factor, the more
the larger lse is. Where one key takes nearly all of a row, dP - Delta is a small difference of large numbers, and that
factor in one of them is larger than what is left.

Delta is summed from P and dP, which are at hand in the compute dtype, rather than from dout . out, whose
`out` has been rounded to the inputs' dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.ops.backend import (
    carve,
    check_indices,
    check_scale,
    check_tensor,
    chunk_rows,
    compute_dtype,
    exp_and_lse_,
    implementation,
    opaque,
    register,
    without_autocast,
)


@opaque
def sparse_mla(
    q_BLHD: Tensor,
    kv_BSD: Tensor,
    indices_BLK: Tensor,
    scale: float,
    d_v: int,
    *,
    deterministic: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query row over its own selected keys (report eq. 2), absorbed MQA form.

    Args:
        q_BLHD: absorbed queries; fp16, bf16, fp32 or fp64.
        kv_BSD: the shared latent, key in all D columns, value in the first d_v; the same dtypes.
        indices_BLK: int32 or int64 key slots of each row, distinct within a row (a slot given twice counts
            twice); -1, anywhere in the row, is no key.
        scale: factor of the logits.
        d_v: value width V, 1 to D.
        deterministic: whether kv's gradient must be the same bits in every run. False lets an implementation add by
            float atomics, in Triton without room for each row's shares; others are deterministic anyway.
        backend: name of the implementation, None for the device's default.

    Returns:
        out_BLHV: in q's dtype; 0 for rows without keys.
        lse_BLH: natural logsumexp of the scaled logits, fp32 (fp64 if an input is fp64), -inf for rows
            without keys; not differentiable.

    Differentiable in q and kv; both gradients are accumulated in the compute dtype.
    Slots that no index names are never read, and a NaN in one reaches neither outputs nor gradients. Raises
    ValueError for shapes, dtypes, devices, indices or d_v that do not fit, or a backend that does not exist.
    """
    sizes: dict[str, int] = {}
    device = q_BLHD.device
    check_tensor("q_BLHD", q_BLHD, "BLHD", sizes, device)
    check_tensor("kv_BSD", kv_BSD, "BSD", sizes, device)
    check_indices(indices_BLK, sizes, device)
    check_scale(scale)
    if isinstance(d_v, bool) or not isinstance(d_v, int) or not 1 <= d_v <= sizes["D"]:
        raise ValueError(f"d_v is {d_v!r}, but it must be an integer from 1 to D = {sizes['D']}.")
    run = implementation("sparse_mla", backend, device)
    with without_autocast(device):
        out_BLHV, lse_BLH = run(q_BLHD, kv_BSD, indices_BLK, scale, d_v, deterministic=deterministic)
    return out_BLHV, lse_BLH


@register("sparse_mla", "torch")
def _sparse_mla_torch(
    q_BLHD: Tensor,
    kv_BSD: Tensor,
    indices_BLK: Tensor,
    scale: float,
    d_v: int,
    *,
    deterministic: bool,  # noqa: ARG001 - it always is
) -> tuple[Tensor, Tensor]:
    out_BLHV, lse_BLH = _SparseMla.apply(q_BLHD, kv_BSD, indices_BLK, scale, d_v)
    return out_BLHV, lse_BLH


class GatheredKeys:
    """Gathers selected rows of a [B, S, width] tensor, with zeros for slots of -1, into one reused buffer."""

    def __init__(self, values_BSX: Tensor, rows: int, K: int) -> None:
        self.values_BSX = values_BSX
        self.buffer = values_BSX.new_empty(rows * K * values_BSX.shape[-1])

    def take(self, b: int, index_CK: Tensor, invalid_CK: Tensor | None) -> Tensor:
        """[C, K, width] of batch entry b. Slots marked in `invalid_CK` name any row and come out as zeros."""
        C, K = index_CK.shape
        taken_CKX = carve(self.buffer, C, K, self.values_BSX.shape[-1])
        torch.index_select(self.values_BSX[b], 0, index_CK.flatten(), out=taken_CKX.view(C * K, -1))
        # Overwritten, not multiplied: the row that stands in for a missing key may hold NaN.
        return taken_CKX if invalid_CK is None else taken_CKX.masked_fill_(invalid_CK.unsqueeze(-1), 0)


def split_selection(indices_CK: Tensor) -> tuple[Tensor, Tensor | None]:
    """int64 slots, 0 for -1, and which were -1 (None if none was); without last columns that no row uses."""
    valid_CK = indices_CK >= 0
    if bool(valid_CK.all()):
        return indices_CK.long(), None
    used = int(valid_CK.any(0).nonzero().amax()) + 1 if bool(valid_CK.any()) else 0
    # Not in place: long() of int64 indices is the caller's own tensor.
    return indices_CK[:, :used].long().clamp(min=0), ~valid_CK[:, :used]


class _SparseMla(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BLHD: Tensor, kv_BSD: Tensor, indices_BLK: Tensor, scale: float, d_v: int
    ) -> tuple[Tensor, Tensor]:
        B, L, H, D = q_BLHD.shape
        K = indices_BLK.shape[-1]
        dtype = compute_dtype(q_BLHD.dtype, kv_BSD.dtype)
        rows = chunk_rows(L, K * max(D, H), dtype)
        out_BLHV = q_BLHD.new_zeros(B, L, H, d_v)
        lse_BLH = torch.full((B, L, H), -torch.inf, dtype=dtype, device=q_BLHD.device)
        keys = GatheredKeys(kv_BSD.to(dtype), rows, K)
        logits_buffer = lse_BLH.new_empty(rows * H * K)
        for b in range(B):
            for first in range(0, L, rows):
                here = (b, slice(first, first + rows))
                index_CK, invalid_CK = split_selection(indices_BLK[here])
                if index_CK.shape[1] == 0:
                    continue
                query_CHD = q_BLHD[here].to(dtype) * scale
                key_CKD = keys.take(b, index_CK, invalid_CK)
                weight_CHK = carve(logits_buffer, *query_CHD.shape[:2], index_CK.shape[1])
                torch.bmm(query_CHD, key_CKD.mT, out=weight_CHK)
                empty_C11 = _mask_logits_(weight_CHK, invalid_CK)
                total_CH1, lse_CH1 = exp_and_lse_(weight_CHK, empty_C11)
                out_BLHV[here] = torch.bmm(weight_CHK, key_CKD[..., :d_v]).div_(total_CH1).to(out_BLHV.dtype)
                lse_BLH[here] = lse_CH1.squeeze(-1)
        ctx.save_for_backward(q_BLHD, kv_BSD, indices_BLK)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV, lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None
        with without_autocast(dout_BLHV.device):
            dq_BLHD, dkv_BSD = _sparse_mla_backward(
                dout_BLHV, ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[0], ctx.needs_input_grad[1]
            )
        return dq_BLHD, dkv_BSD, None, None, None


def _mask_logits_(logits_CHK: Tensor, invalid_CK: Tensor | None) -> Tensor:
    """Sets the logits of missing keys to -inf, in place; returns which rows have no key, as [C, 1, 1]."""
    if invalid_CK is None:
        return torch.zeros(1, 1, 1, dtype=torch.bool, device=logits_CHK.device)
    logits_CHK.masked_fill_(invalid_CK.unsqueeze(1), -torch.inf)
    return invalid_CK.all(1)[:, None, None]


def _sparse_mla_backward(
    dout_BLHV: Tensor, saved: tuple[Tensor, ...], scale: float, needs_dq: bool, needs_dkv: bool
) -> tuple[Tensor | None, Tensor | None]:
    q_BLHD, kv_BSD, indices_BLK = saved
    d_v = dout_BLHV.shape[-1]
    B, L, H, D = q_BLHD.shape
    K = indices_BLK.shape[-1]
    dtype = compute_dtype(q_BLHD.dtype, kv_BSD.dtype)
    rows = chunk_rows(L, K * max(D, H), dtype)
    dq_BLHD = torch.zeros_like(q_BLHD) if needs_dq else None
    dkv_BSD = torch.zeros(kv_BSD.shape, dtype=dtype, device=kv_BSD.device) if needs_dkv else None
    keys = GatheredKeys(kv_BSD.to(dtype), rows, K)
    weight_buffer, dlogit_buffer = (keys.buffer.new_empty(rows * H * K) for _ in range(2))
    dkey_buffer = keys.buffer.new_empty(rows * K * D if needs_dkv else 0)
    for b in range(B):
        for first in range(0, L, rows):
            here = (b, slice(first, first + rows))
            index_CK, invalid_CK = split_selection(indices_BLK[here])
            if index_CK.shape[1] == 0:
                continue
            query_CHD, dout_CHV = q_BLHD[here].to(dtype) * scale, dout_BLHV[here].to(dtype)
            key_CKD = keys.take(b, index_CK, invalid_CK)
            shape_CHK = (*query_CHD.shape[:2], index_CK.shape[1])
            logit_CHK = torch.bmm(query_CHD, key_CKD.mT, out=carve(dlogit_buffer, *shape_CHK))
            _mask_logits_(logit_CHK, invalid_CK)
            weight_CHK = torch.softmax(logit_CHK, -1, out=carve(weight_buffer, *shape_CHK))
            dlogit_CHK = torch.bmm(dout_CHV, key_CKD[..., :d_v].mT, out=carve(dlogit_buffer, *shape_CHK))
            if invalid_CK is not None:
                # Weights too: all are NaN in a row without keys and in a row that saw NaN.
                weight_CHK.masked_fill_(invalid_CK.unsqueeze(1), 0)
                dlogit_CHK.masked_fill_(invalid_CK.unsqueeze(1), 0)
            dlogit_CHK.sub_(torch.linalg.vecdot(weight_CHK, dlogit_CHK).unsqueeze(-1)).mul_(weight_CHK)
            if dq_BLHD is not None:
                dq_BLHD[here] = torch.bmm(dlogit_CHK, key_CKD).mul_(scale).to(dq_BLHD.dtype)
            if dkv_BSD is not None:
                dkey_CKD = torch.bmm(dlogit_CHK.mT, query_CHD, out=carve(dkey_buffer, *key_CKD.shape))
                dkey_CKD[..., :d_v].baddbmm_(weight_CHK.mT, dout_CHV)
                if invalid_CK is not None:
                    # What stands in for a missing key is slot 0, which must not even get 0 * NaN.
                    dkey_CKD.masked_fill_(invalid_CK.unsqueeze(-1), 0)
                dkv_BSD[b].index_add_(0, index_CK.flatten(), dkey_CKD.flatten(0, 1))
    return dq_BLHD, None if dkv_BSD is None else dkv_BSD.to(kv_BSD.dtype)
