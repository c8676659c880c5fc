"""The operators as they are defined: plain formulas, gradients by autograd, built on the reference's own functions.

In fp64 they are the measuring stick. Fed what a subject is fed, they are the baseline, whose error makes the budget:
they compute in at least fp32, and round what attention returns to the dtype of its queries.

A key that a row may not see never reaches that row, even if it holds NaN or overflows: its entries are taken as 0
where they are not finite, and a row that does see such a key is NaN.

Letters: B batch, L query rows, S key slots, H attention heads, D width of a query or key, V width of a value,
J indexer heads, E width of an indexer head, K selected keys, 2 = [start, end).
"""

from collections.abc import Callable
from typing import Any

import torch

from reference.attention import attention_target
from reference.indexer import index_scores, select_topk, selected_mask
from reference.losses import kl_rows
from reference.precision import at_least_fp32, without_autocast

Scores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def visible_keys(bounds_BL2: torch.Tensor, slots: int, indices_BLK: torch.Tensor | None = None) -> torch.Tensor:
    """Boolean `[B, L, S]`: the keys within each row's [start, end), and among its indices if there are any."""
    slot = torch.arange(slots, device=bounds_BL2.device)
    visible = (slot >= bounds_BL2[..., :1]) & (slot < bounds_BL2[..., 1:])
    return visible if indices_BLK is None else visible & selected_mask(indices_BLK, slots)


@torch.no_grad()
def indexer_topk(
    q_BLJE: torch.Tensor, k_BSE: torch.Tensor, w_BLJ: torch.Tensor, bounds_BL2: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k visible keys with the highest index scores (report eq. 1-2), and the scores' logsumexp.

    Returns `indices_BLK`, int32, ascending with −1 at the tail, K = min(k, S), and `lse_BL` over all visible keys,
    −inf without any. Ties: lowest index first, −0.0 equals 0.0, NaN ranks highest.
    """
    scores = index_scores(q_BLJE, k_BSE, w_BLJ)
    visible = visible_keys(bounds_BL2, k_BSE.shape[1])
    return select_topk(scores, visible, k), scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


@without_autocast
def sparse_mla(
    q_BLHD: torch.Tensor, kv_BSD: torch.Tensor, indices_BLK: torch.Tensor, scale: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over the keys that its indices name (report eq. 2, absorbed): z = scale · q · kv[idx].

    Returns `out_BLHV` = softmax(z) · kv[idx, :d_v] in q's dtype, 0 for rows of −1 alone, and `lse_BLH`, the natural
    logsumexp of z, −inf there. Differentiable in q and kv.
    """
    named_BLK = indices_BLK >= 0
    batch = torch.arange(kv_BSD.shape[0], device=kv_BSD.device)[:, None, None]
    # What stands in for −1 is some key of the row's batch entry, and is overwritten: it may hold NaN.
    keys_BLKD = at_least_fp32(kv_BSD)[batch, indices_BLK.clamp_min(0).long()].masked_fill(~named_BLK[..., None], 0.0)
    logits_BLHK = torch.einsum("blhd,blkd->blhk", at_least_fp32(q_BLHD), keys_BLKD) * scale
    weights_BLHK, lse_BLH = _softmax(logits_BLHK, named_BLK)
    out_BLHV = torch.einsum("blhk,blkv->blhv", weights_BLHK, keys_BLKD[..., :d_v])
    return out_BLHV.to(q_BLHD.dtype), lse_BLH


@without_autocast
def dense_mla(
    q_BLHD: torch.Tensor,
    k_BSHD: torch.Tensor,
    v_BSHV: torch.Tensor,
    bounds_BL2: torch.Tensor,
    scale: float,
    indices_BLK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each row over every key within its bounds, and among its indices if there are any.

    Returns `out_BLHV` in q's dtype, 0 for rows without keys, and `lse_BLH`, −inf there. Differentiable in q, k and v.
    """
    visible_BLS = visible_keys(bounds_BL2, k_BSHD.shape[1], indices_BLK)
    keys_BSHD, bad_keys_BS = finite_keys(k_BSHD)
    values_BSHV, bad_values_BS = finite_keys(v_BSHV)
    logits_BLHS = torch.einsum("blhd,bshd->blhs", at_least_fp32(q_BLHD), keys_BSHD) * scale
    weights_BLHS, lse_BLH = _softmax(logits_BLHS, visible_BLS)
    out_BLHV = torch.einsum("blhs,bshv->blhv", weights_BLHS, values_BSHV)
    out_BLHV = _nan_where(_sees(visible_BLS, bad_keys_BS | bad_values_BS)[..., None, None], out_BLHV)
    return out_BLHV.to(q_BLHD.dtype), _nan_where(_sees(visible_BLS, bad_keys_BS)[..., None], lse_BLH)


@without_autocast
def indexer_kl(
    iq_BLJE: torch.Tensor,
    ik_BSE: torch.Tensor,
    w_BLJ: torch.Tensor,
    q_BLHD: torch.Tensor,
    k: torch.Tensor,
    lse_BLH: torch.Tensor,
    bounds_BL2: torch.Tensor,
    scale: float,
    indices_BLK: torch.Tensor | None = None,
    *,
    scores: Scores = index_scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(main attention ‖ softmax of the index scores) over each row's keys (report eq. 3; with indices eq. 4).

    `k` is one key a head `[B, S, H, D]`, or shared by the heads `[B, S, D]`; `lse_BLH` is that of the main attention
    over the same keys, so that exp(scale · q · k − lse) are its probabilities. `scores` stands in for report eq. 1.

    Returns the sum over rows, differentiable in iq, ik and w alone, and `kl_BL`, 0 for rows without keys.
    """
    visible_BLS = visible_keys(bounds_BL2, ik_BSE.shape[1], indices_BLK)
    index_keys_BSE, bad_index_BS = finite_keys(ik_BSE)
    main_keys, bad_main_BS = finite_keys(k)
    scores_BLS = scores(iq_BLJE, index_keys_BSE, w_BLJ).masked_fill(~visible_BLS, -torch.inf)
    kl_BL = kl_rows(scores_BLS, kl_target(q_BLHD, main_keys, lse_BLH, visible_BLS, scale))
    kl_BL = _nan_where(_sees(visible_BLS, bad_index_BS | bad_main_BS), kl_BL)
    return kl_BL.sum(), kl_BL.detach()


@torch.no_grad()
def kl_target(
    q_BLHD: torch.Tensor, k: torch.Tensor, lse_BLH: torch.Tensor, visible_BLS: torch.Tensor, scale: float
) -> torch.Tensor:
    """p `[B, L, S]` in at least fp32: exp(scale · q · k − lse) over the visible keys, summed over heads, L1-normalised."""
    pattern = "blhd,bsd->bhls" if k.dim() == 3 else "blhd,bshd->bhls"
    logits_BHLS = torch.einsum(pattern, at_least_fp32(q_BLHD), at_least_fp32(k)) * scale
    lse_BHL1 = lse_BLH.to(logits_BHLS.dtype).transpose(1, 2)[..., None]
    # Hidden before the exponential: lse is −inf in a row without keys.
    probs_BHLS = (logits_BHLS - lse_BHL1).masked_fill(~visible_BLS[:, None], -torch.inf).exp()
    return attention_target(probs_BHLS)


def scores_beyond(margins: float) -> Scores:
    """`index_scores` whose heads open when a dot product exceeds `margins` times its margin instead of 0.

    The margin of a row is the largest error that fp32 makes in one of its dot products.
    """

    def scores(q_BLJE: torch.Tensor, k_BSE: torch.Tensor, w_BLJ: torch.Tensor) -> torch.Tensor:
        dots_BLJS = _dots(q_BLJE, k_BSE)
        with torch.no_grad():
            off = (_dots(q_BLJE.float(), k_BSE.float()) - _dots(q_BLJE.double(), k_BSE.double())).abs()
            opened = dots_BLJS > margins * off.amax((2, 3), keepdim=True)
        return torch.einsum("bljs,blj->bls", dots_BLJS * opened, at_least_fp32(w_BLJ))

    return scores


def _dots(q_BLJE: torch.Tensor, k_BSE: torch.Tensor) -> torch.Tensor:
    return torch.einsum("blje,bse->bljs", at_least_fp32(q_BLJE), at_least_fp32(k_BSE))


def _softmax(logits_BLHX: torch.Tensor, visible_BLX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(probabilities, natural logsumexp) over the visible; 0 and −inf in rows without any."""
    visible = visible_BLX[:, :, None]
    # A row of −inf alone would give NaN: such rows get equal logits, and 0 afterwards.
    empty = ~visible.any(-1, keepdim=True)
    weights = logits_BLHX.masked_fill(~visible & ~empty, -torch.inf).masked_fill(empty, 0.0).softmax(-1)
    # Not differentiable, as the contract has it.
    lse = logits_BLHX.detach().masked_fill(~visible, -torch.inf).logsumexp(-1)
    return weights.masked_fill(~visible, 0.0), lse


def finite_keys(x_BSX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x in at least fp32 with 0 where it is not finite, which slots hold such an entry)."""
    wide = at_least_fp32(x_BSX)
    finite = torch.isfinite(wide)
    return torch.where(finite, wide, 0.0), ~finite.flatten(2).all(-1)


def _sees(visible_BLS: torch.Tensor, bad_BS: torch.Tensor) -> torch.Tensor:
    """Which rows `[B, L]` see a bad key."""
    return (visible_BLS & bad_BS[:, None]).any(-1)


def _nan_where(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(rows, torch.nan, x)


def reference_operators() -> dict[str, Callable[..., Any]]:
    """The plain definitions as the operators of a subject."""
    return {
        "index_scores": index_scores,
        "indexer_topk": indexer_topk,
        "sparse_mla": sparse_mla,
        "dense_mla": dense_mla,
        "indexer_kl": indexer_kl,
    }
