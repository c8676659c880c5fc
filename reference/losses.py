"""The indexer's KL loss (report eq. 3-4; spec 3).

    L_I = Σ_t KL(p_t ‖ softmax_s I[t, s])        p_t = Σ_h A_h[t, :], L1-normalised

Dense warm-up: s runs over every visible key. Sparse stage: over S_t, on both sides. The candidate set
is written in the scores: −inf outside it.

Letters: B batch, L rows, S key slots.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from .precision import at_least_fp32

Reduction = Literal["mean", "sum"]


def kl_rows(scores_BLS: torch.Tensor, target_BLS: torch.Tensor) -> torch.Tensor:
    """KL(p_t ‖ softmax(I_t)) of each row, `[B, L]` in at least fp32, 0 for rows whose target is empty.

    The support is where the score is not −inf. With 0·log 0 = 0 and no clamp:
    KL = Σ p·log p − Σ p·I + logsumexp(I)·Σ p, whose gradient is softmax(I)·Σ p − p. Target mass outside
    the support gives +inf, which is its value.
    """
    scores = at_least_fp32(scores_BLS)
    target = target_BLS.detach().to(scores.dtype)
    support = scores != -torch.inf
    mass = target.sum(-1)
    # Rows without a target must not reach logsumexp of nothing.
    valid = (mass > 0) & support.any(-1)
    finite = scores.masked_fill(~support, 0.0)
    lse = torch.logsumexp(scores.masked_fill(~valid[..., None], 0.0), -1)
    kl = torch.xlogy(target, target).sum(-1) - (target * finite).sum(-1) + lse * mass
    outside = (target * ~support).sum(-1) > 0
    return torch.where(valid, kl, torch.zeros_like(kl)).masked_fill(outside, torch.inf)


def compute_indexer_kl_loss(
    scores: torch.Tensor | Sequence[torch.Tensor],
    targets: torch.Tensor | Sequence[torch.Tensor],
    reduction: Reduction = "mean",
    num_rows: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The KL loss of all layers, from `outputs.indexer_scores` and `outputs.indexer_kl_targets`.

    Args:
        scores: raw index scores `[B, L, S]`, −inf outside the candidate set; one tensor, or one a layer.
        targets: p `[B, L, S]`, 0 outside the candidate set; it never receives gradient.
        reduction: `"mean"`, Σ over rows / valid rows; `"sum"`, the report's Σ_t. Both are summed over layers, so
            that a layer's gradient does not depend on how many layers there are.
        num_rows: what `"mean"` divides by instead of the number of valid rows, e.g. of a whole accumulated batch.

    A row is valid when its target sums to more than 0: pad rows never are, row 0 is, rows with label −100 are.

    Returns:
        A scalar in at least fp32; 0 when no row is valid.

    Raises:
        ValueError: shapes or numbers of layers that do not match, or an unknown reduction.
    """
    per_layer = [scores] if isinstance(scores, torch.Tensor) else list(scores)
    target_list = [targets] if isinstance(targets, torch.Tensor) else list(targets)
    if not per_layer or len(per_layer) != len(target_list):
        raise ValueError(
            f"compute_indexer_kl_loss: {len(per_layer)} layers of scores and {len(target_list)} of targets; the numbers must be equal and at least 1."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"compute_indexer_kl_loss: reduction is {reduction!r}; it must be 'mean' or 'sum'.")
    total = None
    for layer, (score, target) in enumerate(zip(per_layer, target_list, strict=True)):
        if score.shape != target.shape:
            raise ValueError(
                f"compute_indexer_kl_loss: layer {layer} has scores {tuple(score.shape)} and targets {tuple(target.shape)}; the shapes must be equal."
            )
        loss = kl_rows(score, target).sum()
        if reduction == "mean":
            loss = loss / _rows(num_rows, target, loss)
        # Layers may live on different devices.
        total = loss if total is None else total + loss.to(total.device)
    assert total is not None
    return total


def _rows(num_rows: int | torch.Tensor | None, target: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    rows = (target.sum(-1) > 0).sum() if num_rows is None else torch.as_tensor(num_rows)
    return rows.to(device=like.device, dtype=like.dtype).clamp_min(1)


def causal_lm_loss(
    logits_BLV: torch.Tensor,
    labels_BL: torch.Tensor,
    real_BL: torch.Tensor,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Next-token cross-entropy in at least fp32: row t predicts label t + 1; label −100 and pads count for nothing.

    A target is left out when it, or the row that predicts it, is padding. Mean over the targets, or Σ / `num_items`
    (the number of targets in a whole accumulated batch, as `Trainer` passes it).
    """
    labels = labels_BL[:, 1:].masked_fill(~(real_BL[:, 1:] & real_BL[:, :-1]), -100)
    logits = at_least_fp32(logits_BLV[:, :-1]).flatten(0, 1)
    total = torch.nn.functional.cross_entropy(
        logits, labels.flatten().to(logits.device), ignore_index=-100, reduction="sum"
    )
    count = (labels != -100).sum() if num_items is None else torch.as_tensor(num_items)
    return total / count.to(device=total.device, dtype=total.dtype).clamp_min(1)
