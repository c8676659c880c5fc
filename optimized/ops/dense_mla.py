"""Attention over all visible keys, or the selected among them by masking: MHA form, in chunks of queries.

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, V value width, K selected
keys, C queries in a chunk, n key slots that a chunk visits.

This is the attention of the dense warm-up stage and, with indices, the masked multi-head form of sparse
attention that the report uses for short sequences (its eq. 2 computed by hiding instead of gathering):

    z[h, t, s] = scale * q[t, h] . k[s, h]        P = softmax of z over the visible s        out = P @ v

The backward pass recomputes P, the softmax of z, chunk by chunk; its formulas are those of `sparse_mla`.

NaN in hidden keys. The heads of a chunk share one matrix product over the chunk's key range, which holds keys
that some of its rows may not see. Their weight is exactly 0, but 0 * NaN is NaN. So the operands of those
products are looked over once (`split_finite`): while they are finite, as always in a healthy run, the plain
product is right; otherwise their non-finite entries are taken as 0 and NaN is put exactly where a visible one
would have arrived (a visible infinity in v, too, gives NaN). The same holds for gradients of keys that a
poisoned row does not see.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.ops.backend import (
    Chunk,
    carve,
    check_bounds,
    check_indices,
    check_scale,
    check_tensor,
    chunk_rows,
    compute_dtype,
    exp_and_lse_,
    implementation,
    mark_reached_,
    opaque,
    register,
    row_chunks,
    split_finite,
    visible_keys,
    without_autocast,
)


@opaque
def dense_mla(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query row over the keys in its bounds (and, if given, among its indices).

    Args:
        q_BLHD, k_BSHD, v_BSHV: queries, keys and values per head; fp16, bf16, fp32 or fp64.
        bounds_BL2: int32 or int64, the half-open range [start, end) of key slots that each row may see;
            start == end is a row without keys.
        scale: factor of the logits.
        indices_BLK: None, or int32 or int64 key slots; a row then sees only those of them that its bounds
            hold. -1, anywhere in the row, is no key; a slot given twice counts once.
        backend: name of the implementation, None for the device's default.

    Returns:
        out_BLHV: in q's dtype; 0 for rows without keys.
        lse_BLH: natural logsumexp of the scaled logits, fp32 (fp64 if an input is fp64), -inf for rows
            without keys; not differentiable.

    Differentiable in q, k and v. A NaN in a key that a row may not see reaches neither its output nor
    gradients. Raises ValueError for shapes, dtypes, devices, bounds or indices that do not fit, or a backend
    that does not exist.
    """
    sizes: dict[str, int] = {}
    device = q_BLHD.device
    check_tensor("q_BLHD", q_BLHD, "BLHD", sizes, device)
    check_tensor("k_BSHD", k_BSHD, "BSHD", sizes, device)
    check_tensor("v_BSHV", v_BSHV, "BSHV", sizes, device)
    check_bounds(bounds_BL2, sizes, device)
    if indices_BLK is not None:
        check_indices(indices_BLK, sizes, device)
    check_scale(scale)
    run = implementation("dense_mla", backend, device)
    with without_autocast(device):
        out_BLHV, lse_BLH = run(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, scale, indices_BLK)
    return out_BLHV, lse_BLH


@register("dense_mla", "torch")
def _dense_mla_torch(
    q_BLHD: Tensor,
    k_BSHD: Tensor,
    v_BSHV: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out_BLHV, lse_BLH = _DenseMla.apply(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, scale, indices_BLK)
    return out_BLHV, lse_BLH


def _heads_first(x_BXHY: Tensor, b: int, dtype: torch.dtype) -> Tensor:
    """Batch entry b as a contiguous [H, X, Y] in the compute dtype."""
    return x_BXHY[b].transpose(0, 1).to(dtype).contiguous()


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
        B, L, H, _ = q_BLHD.shape
        S, V = v_BSHV.shape[1], v_BSHV.shape[3]
        dtype = compute_dtype(q_BLHD.dtype, k_BSHD.dtype, v_BSHV.dtype)
        rows = chunk_rows(L, H * S, dtype)
        out_BLHV = q_BLHD.new_zeros(B, L, H, V)
        lse_BLH = torch.full((B, L, H), -torch.inf, dtype=dtype, device=q_BLHD.device)
        buffer = lse_BLH.new_empty(H * rows * S)
        for b, chunks in _by_batch_entry(bounds_BL2, rows):
            key_HSD = _heads_first(k_BSHD, b, dtype)
            value_HSV, bad_HSV = split_finite(_heads_first(v_BSHV, b, dtype))
            for chunk in chunks:
                _, first, last, low, high = chunk
                visible_Cn = visible_keys(bounds_BL2, indices_BLK, chunk)
                query_HCD = _heads_first(q_BLHD[:, first:last], b, dtype) * scale
                weight_HCn = carve(buffer, H, last - first, high - low)
                torch.bmm(query_HCD, key_HSD[:, low:high].mT, out=weight_HCn)
                weight_HCn.masked_fill_(~visible_Cn, -torch.inf)
                total_HC1, lse_HC1 = exp_and_lse_(weight_HCn, ~visible_Cn.any(-1, keepdim=True))
                out_HCV = torch.bmm(weight_HCn, value_HSV[:, low:high]).div_(total_HC1)
                mark_reached_(out_HCV, visible_Cn, None if bad_HSV is None else bad_HSV[:, low:high])
                out_BLHV[b, first:last] = out_HCV.transpose(0, 1).to(out_BLHV.dtype)
                lse_BLH[b, first:last] = lse_HC1.squeeze(-1).T
        ctx.save_for_backward(q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse_BLH)
        ctx.set_materialize_grads(False)
        return out_BLHV, lse_BLH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BLHV: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dout_BLHV is None:
            return None, None, None, None, None, None
        with without_autocast(dout_BLHV.device):
            dq_BLHD, dk_BSHD, dv_BSHV = _dense_mla_backward(dout_BLHV, ctx.saved_tensors, ctx.scale)
        return dq_BLHD, dk_BSHD, dv_BSHV, None, None, None


def _by_batch_entry(bounds_BL2: Tensor, rows: int) -> list[tuple[int, list[Chunk]]]:
    """The chunks with visible keys, grouped by batch entry."""
    grouped: dict[int, list[Chunk]] = {}
    for chunk in row_chunks(bounds_BL2, rows):
        grouped.setdefault(chunk.b, []).append(chunk)
    return list(grouped.items())


def _dense_mla_backward(dout_BLHV: Tensor, saved: tuple[Tensor, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q_BLHD, k_BSHD, v_BSHV, bounds_BL2, indices_BLK = saved
    _, L, H, _ = q_BLHD.shape
    S = k_BSHD.shape[1]
    dtype = compute_dtype(q_BLHD.dtype, k_BSHD.dtype, v_BSHV.dtype)
    rows = chunk_rows(L, H * S, dtype)
    dq_BLHD, dk_BSHD, dv_BSHV = (torch.zeros_like(x) for x in (q_BLHD, k_BSHD, v_BSHV))
    weight_buffer, dlogit_buffer = (torch.empty(H * rows * S, dtype=dtype, device=q_BLHD.device) for _ in range(2))
    for b, chunks in _by_batch_entry(bounds_BL2, rows):
        key_HSD, value_HSV = _heads_first(k_BSHD, b, dtype), _heads_first(v_BSHV, b, dtype)
        clean_key_HSD, bad_key_HSD = split_finite(key_HSD)
        dkey_HSD, dvalue_HSV = torch.zeros_like(key_HSD), torch.zeros_like(value_HSV)
        for chunk in chunks:
            _, first, last, low, high = chunk
            keys = slice(low, high)
            visible_Cn = visible_keys(bounds_BL2, indices_BLK, chunk)
            hidden_Cn = ~visible_Cn
            shape_HCn = (H, last - first, high - low)
            query_HCD = _heads_first(q_BLHD[:, first:last], b, dtype) * scale
            dout_HCV = _heads_first(dout_BLHV[:, first:last], b, dtype)
            logit_HCn = torch.bmm(query_HCD, key_HSD[:, keys].mT, out=carve(dlogit_buffer, *shape_HCn))
            logit_HCn.masked_fill_(hidden_Cn, -torch.inf)
            weight_HCn = torch.softmax(logit_HCn, -1, out=carve(weight_buffer, *shape_HCn))
            dlogit_HCn = torch.bmm(dout_HCV, value_HSV[:, keys].mT, out=carve(dlogit_buffer, *shape_HCn))
            dlogit_HCn.masked_fill_(hidden_Cn, 0)
            delta_HC1 = torch.linalg.vecdot(weight_HCn, dlogit_HCn).unsqueeze(-1)
            dlogit_HCn.sub_(delta_HC1).mul_(weight_HCn)
            if not bool(delta_HC1.isfinite().all()):
                # All weights are NaN in a row without keys and in a row that saw NaN.
                weight_HCn.masked_fill_(hidden_Cn, 0)
                dlogit_HCn.masked_fill_(hidden_Cn, 0)

            dq_HCD = torch.bmm(dlogit_HCn, clean_key_HSD[:, keys])
            mark_reached_(dq_HCD, visible_Cn, None if bad_key_HSD is None else bad_key_HSD[:, keys])
            dq_BLHD[b, first:last] = dq_HCD.mul_(scale).transpose(0, 1).to(dq_BLHD.dtype)
            # No NaN to put back here: a query that is not finite has made all its visible dS NaN.
            dkey_HSD[:, keys].baddbmm_(dlogit_HCn.mT, split_finite(query_HCD)[0])
            dout_HCV, bad_dout_HCV = split_finite(dout_HCV)
            dvalue_HSV[:, keys].baddbmm_(weight_HCn.mT, dout_HCV)
            mark_reached_(dvalue_HSV[:, keys], visible_Cn.T, bad_dout_HCV)
        dk_BSHD[b] = dkey_HSD.transpose(0, 1).to(dk_BSHD.dtype)
        dv_BSHV[b] = dvalue_HSV.transpose(0, 1).to(dv_BSHV.dtype)
    return dq_BLHD, dk_BSHD, dv_BSHV
