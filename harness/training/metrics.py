"""What tells, while it trains, whether an indexer learns: against the zero-information line, and by what it selects.

    KL_uniform   KL(p ‖ u), u(s) = 1/n on the n candidate keys of a row: what an indexer without information reaches
    captured     1 − KL / KL_uniform: 0 for constant scores, 1 for I = log p, negative for a misleading indexer
    recall       Σ_t Σ_{s in S_t} p / Σ_t Σ_{s in best_t} p: the attention mass that the top k of I hold, over the most
                 that k keys can hold (the top k of p)
    left out     1 − mean_t Σ_{s in S_t} p: the attention mass that sparse attention would not see
    same         how far all rows select the same keys: 0 as independent rows do, 1 as one ranking for all rows does
    collapse     same of the indexer's selection less that of the best one: attention itself may want the same keys

Recall, left out, same and collapse are of rows with more than k visible keys: in the others every key is selected.

Letters: B batch, L rows, S key slots.
"""

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from reference import kl_rows
from reference.indexer import select_topk, selected_mask

from .data import Batch
from .layers import Visit, spread_rows, visit_layers

MIB = 2**20
# Elements that a [B, L, S] tensor of a measurement may have. A sequence of 2,896 tokens is the longest that fits whole.
LARGEST = 2**23


def normalised(target_BLS: Tensor) -> Tensor:
    """p in fp64 with rows that sum to 1, or to 0: fp32 rounding of the sum is as large as the KL of even attention."""
    p = target_BLS.double()
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def uniform_kl_rows(target_BLS: Tensor, candidates_BLS: Tensor) -> Tensor:
    """KL(p_t ‖ u_t) of each row, `[B, L]` in fp64; u_t is uniform over the candidate keys of row t.

    From the definition, with u = 1/n and Σ p = 1:  Σ p·log(p / (1/n)) = Σ p·log p + log n = log n − H(p).
    Constant scores predict u whatever the constant. 0 for a row with one candidate, or none.
    """
    p, n = normalised(target_BLS), candidates_BLS.sum(-1).double()
    return torch.where(n > 0, torch.xlogy(p, p).sum(-1) + n.clamp_min(1).log(), 0.0)


def captured_of(kl: float, uniform_kl: float) -> float:
    """1 − KL / KL_uniform; NaN where every row has one candidate."""
    return 1 - kl / uniform_kl if uniform_kl > 0 else math.nan


@dataclass(frozen=True, slots=True)
class LayerQuality:
    """What one layer's indexer does on one batch; the KLs in nats a row, None where no row can tell.

    kl and uniform_kl are over the candidate set of the stage, the others over every visible key.
    """

    kl: float
    uniform_kl: float
    recall: float | None
    left_out: float | None
    same: float | None
    collapse: float | None

    @property
    def captured(self) -> float:
        """1 − KL / KL_uniform; NaN where every row has one candidate."""
        return captured_of(self.kl, self.uniform_kl)


def layer_quality(
    scores_BLS: Tensor, target_BLS: Tensor, k: int, within: tuple[Tensor, Tensor] | None = None
) -> LayerQuality:
    """One layer's numbers, from raw scores (−inf where a key is not visible) and p over every visible key.

    `within`: scores and p over the candidate set, for the KLs; every visible key without it. Rows may be some of a
    sequence's, ascending: L need not be S.
    """
    return LayerQuality(*divergences(*(within or (scores_BLS, target_BLS))), *choice(scores_BLS, target_BLS, k))


def divergences(scores_BLS: Tensor, target_BLS: Tensor) -> tuple[float, float]:
    """KL and KL of the uniform predictor in nats a row, over the keys whose score is not −inf."""
    rows = max(1, int((target_BLS.sum(-1) > 0).sum()))
    kl = float(kl_rows(scores_BLS.double(), normalised(target_BLS)).sum()) / rows
    return kl, float(uniform_kl_rows(target_BLS, scores_BLS != -torch.inf).sum()) / rows


# Recall, left out, same, collapse of a `LayerQuality`.
Choice = tuple[float | None, float | None, float | None, float | None]


def choice(scores_BLS: Tensor, target_BLS: Tensor, k: int) -> Choice:
    """What `k` selected keys do, from scores and p over every visible key; None where no row can tell."""
    visible_BLS = scores_BLS != -torch.inf
    choosing_BL = visible_BLS.sum(-1) > k
    if not bool(choosing_BL.any()):
        return None, None, None, None
    slots = scores_BLS.shape[-1]
    selected_BLS = selected_mask(select_topk(scores_BLS, visible_BLS, k), slots)
    best_BLS = selected_mask(select_topk(target_BLS, visible_BLS, k), slots)
    p = target_BLS.double()
    seen, best = (float((p * chosen).sum(-1)[choosing_BL].mean()) for chosen in (selected_BLS, best_BLS))
    same, wanted = (sameness(chosen, visible_BLS, k) for chosen in (selected_BLS, best_BLS))
    collapse = None if same is None or wanted is None else same - wanted
    return seen / best, 1 - seen, same, collapse


def sameness(selected_BLS: Tensor, visible_BLS: Tensor, k: int) -> float | None:
    """How far rows select the same keys, beyond what causality and chance make them share; None without a pair of rows.

    Of two rows t < t' of a document, with n_t and n_t' > k visible keys, let both choose k. Independent rows share
    k · k / n_t' keys on average. If one ranking of the keys served all rows, the later row would keep those of its k
    that the earlier one could see, and the earlier one chose them all: k · n_t / n_t'. Hence

        same = Σ (|S_t ∩ S_t'| − k²/n_t') / Σ (k·n_t/n_t' − k²/n_t')

    over all pairs: 0 for independent rows, 1 for one ranking, above 1 when that ranks the first keys highest, as
    constant scores do by the rule of ties. A window of recent keys is near 0: its rows share keys with few others.
    """
    n_BL = visible_BLS.sum(-1).double()
    # A row's document, named by its first visible slot.
    start_BL = visible_BLS.int().argmax(-1)
    chosen = selected_BLS.float()
    shared_BLL = (chosen @ chosen.mT).double()
    choosing_BL = n_BL > k
    earlier = torch.ones_like(shared_BLL[0], dtype=torch.bool).triu(1)
    pairs = earlier & choosing_BL[:, :, None] & choosing_BL[:, None, :] & (start_BL[:, :, None] == start_BL[:, None, :])
    if not bool(pairs.any()):
        return None
    n_early, n_late = (x.expand_as(shared_BLL)[pairs] for x in (n_BL[:, :, None], n_BL[:, None, :]))
    by_chance = k * k / n_late
    return float((shared_BLL[pairs] - by_chance).sum() / (k * n_early / n_late - by_chance).sum())


@dataclass(frozen=True, slots=True)
class IndexerQuality:
    """The layers' numbers on one batch, at `k` selected keys; `rows` of each sequence, None for all."""

    k: int
    layers: tuple[LayerQuality, ...]
    rows: int | None = None

    @property
    def captured(self) -> float:
        """Mean over the layers."""
        return sum(layer.captured for layer in self.layers) / len(self.layers)

    @property
    def collapse(self) -> float | None:
        """The largest of any layer: one layer whose rows all read the same keys is enough."""
        return max((layer.collapse for layer in self.layers if layer.collapse is not None), default=None)

    def values(self) -> dict[str, Any]:
        """Flat, for a record: KLs summed over the layers as the loss sums them, the rest means over the layers."""
        found: dict[str, Any] = {
            "uniform_kl": sum(layer.uniform_kl for layer in self.layers),
            "captured": self.captured,
            "captured_layers": [layer.captured for layer in self.layers],
            "k": self.k,
        }
        if self.rows is not None:
            found["rows measured"] = self.rows
        recalls = [layer.recall for layer in self.layers if layer.recall is not None]
        left_out = [layer.left_out for layer in self.layers if layer.left_out is not None]
        if recalls:
            found |= {"recall": sum(recalls) / len(recalls), "left_out": sum(left_out) / len(left_out)}
        same = [layer.same for layer in self.layers if layer.same is not None]
        if same:
            found |= {"same": sum(same) / len(same), "collapse": self.collapse}
        return found


def nothing(_layer: int, _scores_BRS: Tensor, _target_BRS: Tensor) -> None:
    """A `Visit` that does not look."""


def measure_indexer(
    model: nn.Module, batch: Batch, *, sparse: bool, candidates: Visit = nothing, visible: Visit = nothing
) -> IndexerQuality:
    """The indexer of every layer on `batch`, against the attention that the model would pay to every visible key.

    KL and KL_uniform are over the candidate set of the mode: the selected keys where `sparse`, else every visible one.
    The rest comes from a forward in dense mode. Nothing is left behind: no gradient, no random number, no mode.

    One layer's tensors are there at a time, and none of `[B, L, S]` is larger than `LARGEST`: of a batch whose would be
    the first sequences are measured, and of a sequence that is too long by itself evenly spaced rows.

    `candidates` and `visible` are shown each layer too, on the candidate set of the mode and on every visible key.
    """
    k = cast(Any, model).config.index_topk
    sequences, rows_R = _measured(*batch.input_ids_BL.shape)
    found: list[tuple[float, float]] = []
    choices: list[Choice] = []

    def on_candidates(layer: int, scores_BRS: Tensor, target_BRS: Tensor) -> None:
        found.append(divergences(scores_BRS, target_BRS))
        candidates(layer, scores_BRS, target_BRS)

    def on_visible(layer: int, scores_BRS: Tensor, target_BRS: Tensor) -> None:
        choices.append(choice(scores_BRS, target_BRS, k))
        visible(layer, scores_BRS, target_BRS)
        if not sparse:
            on_candidates(layer, scores_BRS, target_BRS)

    inputs = _inputs(model, batch, sequences)
    with attention_mode(model, sparse=False):
        visit_layers(model, inputs, on_visible, visible=True, rows_R=rows_R, largest=LARGEST)
    if sparse:
        with attention_mode(model, sparse=True):
            visit_layers(model, inputs, on_candidates, visible=False, rows_R=rows_R, largest=LARGEST)
    layers = tuple(LayerQuality(*kls, *chosen) for kls, chosen in zip(found, choices, strict=True))
    return IndexerQuality(k, layers, None if rows_R is None else len(rows_R))


def _measured(batch: int, length: int) -> tuple[int, Tensor | None]:
    """How many sequences are measured, and which rows of them; None for all."""
    if length**2 <= LARGEST:
        return min(batch, LARGEST // length**2), None
    # A mask of what is selected has a column more than there are keys.
    return 1, spread_rows(length, max(1, LARGEST // (length + 1)))


def _inputs(model: nn.Module, batch: Batch, sequences: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    parts = {
        "input_ids": batch.input_ids_BL,
        "attention_mask": batch.attention_mask_BL,
        "position_ids": batch.position_ids_BL,
    }
    return {name: part[:sequences].to(device) for name, part in parts.items() if part is not None}


def indexer_tensors(model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Raw scores on every visible key and p `[B, L, S]` of the dense model: all rows, all layers at once, any length."""
    found: list[tuple[Tensor, Tensor]] = []
    with attention_mode(model, sparse=False):
        visit_layers(
            model, _inputs(model, batch, len(batch.input_ids_BL)), lambda _, *pair: found.append(pair),
            visible=True, rows_R=None, largest=LARGEST,
        )  # fmt: skip
    return found


@contextmanager
def attention_mode(model: nn.Module, *, sparse: bool) -> Iterator[None]:
    """The model in eval mode and in dense or sparse attention, for a while."""
    config = cast(Any, model).config
    before = config.use_sparse_attention, config.indexer_kl_coef, model.training
    config.use_sparse_attention, config.indexer_kl_coef = sparse, 0.0
    model.eval()
    try:
        yield
    finally:
        config.use_sparse_attention, config.indexer_kl_coef, training = before
        model.train(training)


def resident_mib() -> float:
    """Resident memory of this process now, in MiB; where the system has no /proc, the largest so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024
