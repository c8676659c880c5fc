"""Selections of keys, judged where the choice is clear, and selections that any judge must reject.

Letters: B batch, L query rows, S key slots, K selected keys, 2 = [start, end).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from reference.indexer import select_topk, selected_mask

from .plain import visible_keys


@dataclass(frozen=True, slots=True)
class Wrong:
    """How many indices of a selection are wrong, by kind, and how many differ within the margin, which is no fault.

    shape: 1 for a tensor that is not int32 `[B, L, min(k, S)]`. range: below −1, or S and beyond. future, past: behind
    a row's end, before its start. repeated: named twice in a row. order: rows that are not ascending with −1 at the
    tail. count: rows that hold another number of visible keys than min(k, visible). missing, extra: keys on the wrong
    side of the boundary by more than the margin.
    """

    shape: int = 0
    range: int = 0
    future: int = 0
    past: int = 0
    repeated: int = 0
    order: int = 0
    count: int = 0
    missing: int = 0
    extra: int = 0
    flips: int = 0

    @property
    def total(self) -> int:
        """All that is wrong; flips are not."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "flips")


def judge_selection(
    indices_BLK: torch.Tensor, scores_BLS: torch.Tensor, bounds_BL2: torch.Tensor, k: int, margin: float
) -> Wrong:
    """Judge absolute slots `[B, L, min(k, S)]` by exact scores: what is clear must be right, what is near may differ."""
    slots = scores_BLS.shape[-1]
    expected_shape = (*scores_BLS.shape[:2], min(k, slots))
    if indices_BLK.dtype != torch.int32 or indices_BLK.shape != expected_shape:
        return Wrong(shape=1)
    visible = visible_keys(bounds_BL2, slots)
    start, end = bounds_BL2.split(1, dim=-1)
    named = indices_BLK >= 0
    out_of_range = (indices_BLK < -1) | (indices_BLK >= slots)
    future = named & (indices_BLK >= end) & ~out_of_range
    past = named & (indices_BLK < start) & ~out_of_range
    ordered = indices_BLK.sort(-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    # −1 counts as behind every slot.
    place = torch.where(named, indices_BLK, slots)
    disorder = (place[..., 1:] < place[..., :-1]).any(-1)

    mask = selected_mask(torch.where(out_of_range, -1, indices_BLK), slots) & visible
    count, wanted = mask.sum(-1), visible.sum(-1).clamp_max(k)
    hidden_low = scores_BLS.masked_fill(~visible, -torch.inf)
    boundary = hidden_low.sort(dim=-1, descending=True).values[..., min(k, slots) - 1, None]
    all_of_them = (visible.sum(-1) <= k)[..., None]
    must = torch.where(all_of_them, visible, visible & (scores_BLS > boundary + margin))
    must_not = visible & (scores_BLS < boundary - margin) & ~all_of_them
    exact = selected_mask(select_topk(scores_BLS, visible, k), slots)
    return Wrong(
        range=int(out_of_range.sum()), future=int(future.sum()), past=int(past.sum()), repeated=int(repeated.sum()),
        order=int(disorder.sum()), count=int((count != wanted).sum()), missing=int((must & ~mask).sum()),
        extra=int((must_not & mask).sum()), flips=int((exact & ~mask & ~must).sum()),
    )  # fmt: skip


def wrong_selections(
    scores_BLS: torch.Tensor, bounds_BL2: torch.Tensor, k: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Selections by kind that every judge must reject; kinds that happen to be right here are left out."""
    visible = visible_keys(bounds_BL2, scores_BLS.shape[-1])
    right = select_topk(scores_BLS, visible, k)
    for kind, candidate in _candidates(scores_BLS, bounds_BL2, visible, right, k, generator):
        if not torch.equal(candidate, right):
            yield kind, candidate


def _candidates(
    scores: torch.Tensor, bounds_BL2: torch.Tensor, visible: torch.Tensor, right: torch.Tensor, k: int,
    generator: torch.Generator,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    slots, width = scores.shape[-1], right.shape[-1]
    noise = torch.rand(scores.shape, generator=generator, dtype=torch.float64).to(scores)
    position = torch.arange(slots, device=scores.device).expand_as(scores).to(scores)
    yield "random keys", select_topk(noise, visible, k)
    yield "most recent keys", select_topk(position, visible, k)
    yield "lowest scores", select_topk(-scores, visible, k)
    yield "the next row's scores", select_topk(scores.roll(-1, 1), visible, k)
    if k > 1:
        fewer = select_topk(scores, visible, k - 1)
        yield "k − 1 keys", torch.nn.functional.pad(fewer, (0, width - fewer.shape[-1]), value=-1)
    end = bounds_BL2[..., 1:].to(torch.int32)
    last = torch.where(right[..., :1] >= 0, right.amax(-1, keepdim=True), -1)
    yield "a future key", torch.where((right == last) & (right >= 0) & (end < slots), end, right)
    if width > 1:
        twice = right.clone()
        twice[..., 0] = torch.where(right[..., 1] >= 0, right[..., 1], right[..., 0])
        yield "a key twice", twice
