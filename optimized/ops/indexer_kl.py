"""The indexer's training loss, streamed: KL of the main attention from the indexer (report eq. 3, and eq. 4).

Shape legend: B batch, L query rows, S key slots, H attention heads, D q/k width, J indexer heads, E indexer
head dim, K selected keys, C queries in a chunk, n key slots that a chunk visits (the K gathered ones, where
it gathers).

    p[t, s] = sum_h exp(scale * q[t, h] . k[s] - lse[t, h]), divided by its sum over s
    KL[t] = sum_s p[t, s] (log p[t, s] - log softmax(I[t])[s])

over the keys that row t attends to: all in its bounds (eq. 3, dense warm-up) or the selected ones (eq. 4,
sparse training, where the softmax of I runs over the selected set too). With lse over the same keys each head's exp
sums to 1 but for the rounding of lse, which the report's L1 normalisation takes out: dI = softmax(I) - p is small in
a trained indexer, and would not sum to 0. p is a constant: no gradient reaches q, k or lse.

The gradient has a closed form, which needs neither a clamp nor log p:

    dI = softmax(I) - p     dw_j = sum_s dI relu(a_j)     da_j = dI w_j 1[a_j > 0]     a_j = iq_j . ik

It costs less than storing what it would take to find it later, so it is computed in the loop of the forward
pass when it will be wanted, kept in the compute dtype (the inputs' sizes), and only scaled in the backward
pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    implementation,
    mark_reached_,
    opaque,
    register,
    resolve_backend,
    row_chunks,
    split_finite,
    visible_keys,
    without_autocast,
)
from optimized.ops.indexer_topk import index_scores

# Mean over all heads of a tensor that is a mean over this process's: see `indexer_kl`.
SumHeads = Callable[[Tensor], Tensor]


@opaque
def indexer_kl(
    iq_BLJE: Tensor,
    ik_BSE: Tensor,
    w_BLJ: Tensor,
    q_BLHD: Tensor,
    k: Tensor,
    lse_BLH: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None = None,
    *,
    backend: str | None = None,
    sum_heads: SumHeads | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over rows of KL(main attention || softmax of index scores): report eq. 3, or eq. 4 with indices.

    Args:
        iq_BLJE, ik_BSE, w_BLJ: indexer queries, keys and head weights with all scales folded in, as for
            `indexer_topk`; fp16, bf16, fp32 or fp64.
        q_BLHD: main attention's queries, the same dtypes.
        k: its keys, shared by the heads [B, S, D] (absorbed form) or per head [B, S, H, D].
        lse_BLH: natural logsumexp of the main attention's scaled logits over the same keys, as its operator
            returns it: `dense_mla` without indices, or either operator with the same indices.
        bounds_BL2: int32 or int64, the half-open range [start, end) of key slots that each row may see;
            start == end is a row without keys.
        scale: factor of the main attention's logits.
        indices_BLK: None, or int32 or int64 key slots, distinct within a row; a row's keys are then those of
            them that its bounds hold. -1, anywhere in the row, is no key.
        backend: name of the implementation, None for the device's default.
        sum_heads: given where the heads are divided among processes that hold the same rows: adds the tensor that it
            is given, this process's heads' mean of the attention weights, to the others' and returns their mean. It is
            called once for each chunk of rows, in the same order everywhere. The implementation "torch" alone has a
            place for it.

    Returns:
        kl_sum: scalar, the sum of kl_BL; differentiable in iq, ik and w, and in nothing else.
        kl_BL: the divergence of each row, 0 for rows without keys; not differentiable.

    Both are fp32, or fp64 if any input is fp64. 0 log 0 is 0, nothing is clamped. A NaN in a key that is not
    a row's reaches neither its divergence nor gradients. Raises ValueError for shapes, dtypes, devices,
    bounds or indices that do not fit, or a backend that does not exist.
    """
    sizes: dict[str, int] = {}
    device = iq_BLJE.device
    check_tensor("iq_BLJE", iq_BLJE, "BLJE", sizes, device)
    check_tensor("ik_BSE", ik_BSE, "BSE", sizes, device)
    check_tensor("w_BLJ", w_BLJ, "BLJ", sizes, device)
    check_tensor("q_BLHD", q_BLHD, "BLHD", sizes, device)
    check_tensor("k", k, "BSHD" if k.ndim == 4 else "BSD", sizes, device)
    check_tensor("lse_BLH", lse_BLH, "BLH", sizes, device)
    check_bounds(bounds_BL2, sizes, device)
    if indices_BLK is not None:
        check_indices(indices_BLK, sizes, device)
    check_scale(scale)
    if sum_heads is not None and (name := resolve_backend("indexer_kl", backend, device)) != "torch":
        raise ValueError(f"sum_heads is given with backend {name!r}; the implementation 'torch' alone takes it.")
    run = implementation("indexer_kl", backend, device)
    more = {} if sum_heads is None else {"sum_heads": sum_heads}
    q_BLHD, k, lse_BLH = q_BLHD.detach(), k.detach(), lse_BLH.detach()
    with without_autocast(device):
        kl_sum, kl_BL = run(iq_BLJE, ik_BSE, w_BLJ, q_BLHD, k, lse_BLH, bounds_BL2, scale, indices_BLK, **more)
    return kl_sum, kl_BL


# What an implementation is: (iq, ik, w, q, k, lse, bounds, scale, indices, wanted) -> the rows' divergences and, if
# wanted, the gradients of their sum in iq, ik and w.
Stream = Callable[..., tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]]


def streamed(
    stream: Stream, iq_BLJE: Tensor, ik_BSE: Tensor, w_BLJ: Tensor, *others: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """(kl_sum, kl_BL) of an implementation, kl_sum differentiable in iq, ik and w."""
    # Asked here, because inside of forward gradients are always off.
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (iq_BLJE, ik_BSE, w_BLJ))
    kl_sum, kl_BL = _IndexerKl.apply(stream, wanted, iq_BLJE, ik_BSE, w_BLJ, *others)
    return kl_sum, kl_BL


class _IndexerKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, stream: Stream, wanted: bool, iq_BLJE: Tensor, ik_BSE: Tensor, w_BLJ: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        kl_BL, grads = stream(iq_BLJE, ik_BSE, w_BLJ, *others, wanted)
        if grads is not None:
            ctx.save_for_backward(*grads)
            ctx.dtypes = [x.dtype for x in (iq_BLJE, ik_BSE, w_BLJ)]
        ctx.inputs = 5 + len(others)
        ctx.mark_non_differentiable(kl_BL)
        ctx.set_materialize_grads(False)
        return kl_BL.sum(), kl_BL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dsum is None:
            return (None,) * ctx.inputs
        needed = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:5], strict=True)
        grads = [(grad * dsum).to(dtype) if need else None for grad, dtype, need in needed]
        return (None, None, *grads, *(None,) * (ctx.inputs - 5))


@register("indexer_kl", "torch")
def _indexer_kl_torch(*inputs: Any, sum_heads: SumHeads | None = None) -> tuple[Tensor, Tensor]:
    return streamed(partial(_stream, sum_heads=sum_heads), *inputs)


class _Keys(NamedTuple):
    """The keys of a chunk: a range of slots that its rows share, or slots gathered for each row."""

    # [n, E] of the range, or gathered [C, K, E] with zeros where hidden.
    index_keys: Tensor
    # [n, D] of the range, [n, H, D] of the range per head, or gathered [C, K, D].
    main_keys: Tensor
    # Which of the n (or K) keys each row sees.
    visible_Cn: Tensor
    # The gathered slots, int64, 0 where hidden; None for a range.
    slot_CK: Tensor | None


def _stream(
    iq_BLJE: Tensor,
    ik_BSE: Tensor,
    w_BLJ: Tensor,
    q_BLHD: Tensor,
    k: Tensor,
    lse_BLH: Tensor,
    bounds_BL2: Tensor,
    scale: float,
    indices_BLK: Tensor | None,
    wanted: bool,
    *,
    sum_heads: SumHeads | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The rows' divergences, and the gradients of their sum."""
    indexer = (iq_BLJE, ik_BSE, w_BLJ)
    dtype = compute_dtype(*(x.dtype for x in (*indexer, q_BLHD, k, lse_BLH)))
    diq_BLJE, dik_BSE, dw_BLJ = (torch.zeros(x.shape if wanted else 0, dtype=dtype, device=x.device) for x in indexer)
    grads = (diq_BLJE, dik_BSE, dw_BLJ) if wanted else None
    B, L, J, E = iq_BLJE.shape
    S, H, D = ik_BSE.shape[1], q_BLHD.shape[2], q_BLHD.shape[3]
    # Keys per head are masked, not gathered: a chunk of gathered ones would be H times as large.
    gathered_BLK = indices_BLK if k.ndim == 3 else None
    n_max, widest = (S, max(H, J)) if gathered_BLK is None else (gathered_BLK.shape[-1], max(H, J, D, E))
    rows = chunk_rows(L, n_max * widest, dtype)
    kl_BL = torch.zeros(B, L, dtype=dtype, device=iq_BLJE.device)
    if n_max == 0:
        return kl_BL, grads
    ik_BSE, k = ik_BSE.to(dtype), k.to(dtype)
    relu_buffer, logit_buffer = kl_BL.new_empty(rows * J * n_max), kl_BL.new_empty(rows * H * n_max)
    for chunk in row_chunks(bounds_BL2, rows):
        b, first, last, low, high = chunk
        here = (b, slice(first, last))
        if gathered_BLK is None:
            visible_Cn = visible_keys(bounds_BL2, indices_BLK, chunk)
            keys = _Keys(ik_BSE[b, low:high], k[b, low:high], visible_Cn, None)
        else:
            keys = _gather(ik_BSE[b], k[b], bounds_BL2[here], gathered_BLK[here])
        hidden_Cn = ~keys.visible_Cn
        iq_CJE = iq_BLJE[here].to(dtype)
        # A row without keys has no gradient, even if its head weights are not finite.
        w_CJ = w_BLJ[here].to(dtype).masked_fill(hidden_Cn.all(-1, keepdim=True), 0)
        score_Cn, relu_CJn = index_scores(iq_CJE, keys.index_keys, w_CJ, relu_buffer)
        if grads is not None and not bool(score_Cn.isfinite().all()):
            # Where relu is not finite, the score is not either. Hidden ones would leak through 0 * inf.
            relu_CJn.masked_fill_(hidden_Cn.unsqueeze(1), 0)
        p_Cn = _target(q_BLHD[here].to(dtype) * scale, lse_BLH[here].to(dtype), keys, logit_buffer)
        if sum_heads is not None:
            # Before p is used for anything: a divergence of some heads' p is not a part of the divergence of all.
            p_Cn = sum_heads(p_Cn)
        p_Cn.masked_fill_(hidden_Cn, 0)
        mass_C1 = p_Cn.sum(-1, keepdim=True)
        # A row without keys has none.
        p_Cn.div_(mass_C1.masked_fill_(mass_C1 == 0, 1))
        score_Cn.masked_fill_(hidden_Cn, -torch.inf)
        lse_C1 = score_Cn.logsumexp(-1, keepdim=True)
        log_ratio_Cn = p_Cn.log().sub_(score_Cn.sub_(lse_C1))
        kl_BL[here] = log_ratio_Cn.mul_(p_Cn).masked_fill_(p_Cn == 0, 0).sum(-1)
        if grads is not None:
            dscore_Cn = score_Cn.exp_().sub_(p_Cn).masked_fill_(hidden_Cn, 0)
            _add_gradients(grads, chunk, dscore_Cn, relu_CJn, iq_CJE, w_CJ, keys)
    return kl_BL, grads


def _gather(ik_SE: Tensor, k_SD: Tensor, bounds_C2: Tensor, indices_CK: Tensor) -> _Keys:
    """The selected keys of each row, zeros where a slot is -1 or outside of the row's bounds."""
    slot_CK = indices_CK.long()
    visible_CK = (slot_CK >= bounds_C2[:, :1]) & (slot_CK < bounds_C2[:, 1:])
    slot_CK = slot_CK.masked_fill(~visible_CK, 0)
    hidden_CK1 = ~visible_CK.unsqueeze(-1)
    index_CKE, main_CKD = (
        x.index_select(0, slot_CK.flatten()).unflatten(0, slot_CK.shape).masked_fill_(hidden_CK1, 0)
        for x in (ik_SE, k_SD)
    )
    return _Keys(index_CKE, main_CKD, visible_CK, slot_CK)


def _target(q_CHD: Tensor, lse_CH: Tensor, keys: _Keys, buffer: Tensor) -> Tensor:
    """p as [C, n], not masked yet: the mean of the heads' attention weights. `q_CHD` is scaled already."""
    C, H, D = q_CHD.shape
    n = keys.visible_Cn.shape[1]
    if keys.slot_CK is None and keys.main_keys.ndim == 3:
        weight_HCn = carve(buffer, H, C, n)
        torch.bmm(q_CHD.transpose(0, 1), keys.main_keys.permute(1, 2, 0), out=weight_HCn)
        return weight_HCn.sub_(lse_CH.T.unsqueeze(-1)).exp_().mean(0)
    weight_CHn = carve(buffer, C, H, n)
    if keys.slot_CK is None:
        torch.mm(q_CHD.reshape(C * H, D), keys.main_keys.T, out=weight_CHn.view(C * H, n))
    else:
        torch.bmm(q_CHD, keys.main_keys.mT, out=weight_CHn)
    return weight_CHn.sub_(lse_CH.unsqueeze(-1)).exp_().mean(1)


def _add_gradients(
    grads: tuple[Tensor, ...],
    chunk: Chunk,
    dscore_Cn: Tensor,
    relu_CJn: Tensor,
    iq_CJE: Tensor,
    w_CJ: Tensor,
    keys: _Keys,
) -> None:
    """Adds one chunk's gradients of iq, ik and w. `dscore_Cn` is 0 where hidden; overwrites `relu_CJn`."""
    diq_BLJE, dik_BSE, dw_BLJ = grads
    b, first, last, low, high = chunk
    C, J, n = relu_CJn.shape
    dw_BLJ[b, first:last] = torch.bmm(relu_CJn, dscore_Cn.unsqueeze(-1)).squeeze(-1)
    # dI 1[a > 0]; the factor w joins on the other side of the products, where there is less to multiply.
    da_CJn = relu_CJn.sign_().mul_(dscore_Cn.unsqueeze(1))
    weighted_CJE = iq_CJE * w_CJ.unsqueeze(-1)
    if keys.slot_CK is not None:
        diq_CJE = torch.bmm(da_CJn, keys.index_keys)
        dkey_CKE = torch.bmm(da_CJn.mT, weighted_CJE).masked_fill_(~keys.visible_Cn.unsqueeze(-1), 0)
        dik_BSE[b].index_add_(0, keys.slot_CK.flatten(), dkey_CKE.flatten(0, 1))
    else:
        key_nE, bad_key_nE = split_finite(keys.index_keys)
        diq_CJE = torch.mm(da_CJn.view(C * J, n), key_nE).view(C, J, -1)
        mark_reached_(diq_CJE.transpose(0, 1), keys.visible_Cn, bad_key_nE)
        weighted_CJE, bad_CJE = split_finite(weighted_CJE)
        dik_BSE[b, low:high].addmm_(da_CJn.view(C * J, n).T, weighted_CJE.reshape(C * J, -1))
        mark_reached_(dik_BSE[b, low:high], keys.visible_Cn.T, None if bad_CJE is None else bad_CJE.sum(1))
    diq_BLJE[b, first:last] = diq_CJE.mul_(w_CJ.unsqueeze(-1))
