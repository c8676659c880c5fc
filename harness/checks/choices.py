"""Choices: on the replayed states, what the subject would have chosen, judged where the choice is clear.

The first of the three verdicts. A key (an expert) whose score lies farther from the boundary than the margin must be
chosen by both or by neither. The margin is twice the reference's own score error in the subject's precision.

Letters: B batch, L rows, S key slots, K chosen keys, X experts, T chosen experts, G groups.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reference import DeepseekV32Config
from reference.indexer import select_topk, selected_mask
from reference.layout import Layout, build_layout
from reports.schema import Measure, NullCandidate

from ..budgets import MARGIN_FACTOR, scalar_budget
from ..cases import Case
from .base import Answer, Bench, Check, Oracle


def layout_of(case: Case, device: torch.device) -> Layout:
    """The case's layout: which keys each row may choose."""
    batch, length = case.input_ids.shape
    return build_layout(
        batch, length, device,
        attention_mask=case.attention_mask, position_ids=None if case.position_ids is None else case.position_ids.to(device),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How many choices of one layer are wrong, how many differ within the margin, and out of how many."""

    wrong: int
    flips: int
    rows: int


def judge_keys(chosen_BLK: torch.Tensor, scores_BLS: torch.Tensor, layout: Layout, k: int, margin: float) -> Verdicts:
    """Judge one layer's selection (indices from each row's document start, −1 at the tail).

    Wrong is: an index out of range or repeated, a number of keys other than min(k, visible), a key above the boundary by
    more than `margin` that is missing, or one below it by more that is there.
    """
    visible = layout.visible_BLS()
    count = visible.sum(-1)
    in_range = (chosen_BLK >= -1) & (chosen_BLK < count[..., None])
    ordered = chosen_BLK.sort(-1).values
    repeated = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum()
    usable = torch.where(in_range & (count[..., None] > 0), chosen_BLK, -1)
    mask = selected_mask(layout.to_slots(layout.from_relative(usable)), layout.num_slots)

    scores = scores_BLS.masked_fill(~visible, -torch.inf)
    boundary = scores.sort(dim=-1, descending=True).values[..., min(k, scores.shape[-1]) - 1 : min(k, scores.shape[-1])]
    must = visible & (scores > boundary + margin)
    must_not = visible & (scores < boundary - margin)
    # With no more than k visible keys, every one of them is chosen.
    all_of_them = (count <= k)[..., None]
    must, must_not = torch.where(all_of_them, visible, must), must_not & ~all_of_them
    wrong_count = (mask.sum(-1) != count.clamp_max(k)).sum()
    exact = selected_mask(select_topk(scores, visible, k), layout.num_slots)
    wrong = int((must & ~mask).sum() + (must_not & mask).sum() + repeated + (~in_range).sum() + wrong_count)
    return Verdicts(wrong, int((exact & ~mask).sum()), int((count > 0).sum()))


def wrong_selections(
    scores_BLS: torch.Tensor, layout: Layout, k: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Null candidates: selections that every check of keys must reject."""
    visible = layout.visible_BLS()
    position = torch.arange(layout.num_slots, device=visible.device).expand_as(scores_BLS).to(scores_BLS.dtype)
    noise = torch.rand(scores_BLS.shape, generator=generator, dtype=torch.float64).to(scores_BLS)
    for kind, ranking in (
        ("random keys", noise),
        ("most recent keys", position),
        ("lowest scores", -scores_BLS),
        ("the next row's scores", scores_BLS.roll(-1, 1).masked_fill(~torch.isfinite(scores_BLS.roll(-1, 1)), 0.0)),
    ):
        yield kind, relative_topk(ranking, visible, k, layout)
    fewer = relative_topk(scores_BLS, visible, k - 1, layout) if k > 1 else None
    if fewer is not None:
        yield "k − 1 keys", fewer


def relative_topk(scores_BLS: torch.Tensor, visible_BLS: torch.Tensor, k: int, layout: Layout) -> torch.Tensor:
    """The top-k of `scores` as a tape holds it."""
    slots = select_topk(scores_BLS, visible_BLS, k).long()
    compact = layout.compact_BS.gather(1, slots.clamp_min(0).flatten(1)).view_as(slots)
    return layout.to_relative(torch.where(slots < 0, -1, compact))


def score_margin(exact_BLS: torch.Tensor, low_BLS: torch.Tensor) -> float:
    """The margin of one layer's scores, from the reference's own error in low precision; both are −inf where invisible."""
    off = torch.where(torch.isfinite(exact_BLS), (low_BLS.double() - exact_BLS).abs(), 0.0)
    return MARGIN_FACTOR * float(off.max())


def margins_and_nulls(oracle: Oracle, layout: Layout, k: int) -> tuple[list[float], dict[str, bool]]:
    """Each layer's margin, and which kinds of wrong selections are rejected in every layer."""
    generator = torch.Generator().manual_seed(oracle.case.seed)
    margins: list[float] = []
    rejected: dict[str, bool] = {}
    for exact, low in zip(oracle.seen.scores_BLS, oracle.baseline.scores_BLS, strict=True):
        margins.append(score_margin(exact, low))
        for kind, candidate in wrong_selections(exact, layout, k, generator):
            judged = judge_keys(candidate, exact, layout, k, margins[-1])
            rejected[kind] = rejected.get(kind, True) and judged.wrong > 0
    return margins, rejected


def keys(bench: Bench) -> Answer:
    """Top-k keys of every layer."""
    layout, k = layout_of(bench.case, bench.device), bench.case.config.index_topk
    wrong = flips = rows = 0
    worst_margin = 0.0
    seen_by_layer = []
    margins, rejected = bench.oracle.remember("keys", lambda: margins_and_nulls(bench.oracle, layout, k))
    assert bench.seen.decisions is not None
    for i, (decision, margin) in enumerate(zip(bench.seen.decisions, margins, strict=True)):
        exact = bench.expected.scores_BLS[i]
        if decision.topk_indices is None:
            return Answer([Measure("layers without a selection", 1.0, 0.0)], [], f"layer {i} reports no top-k indices")
        found = judge_keys(decision.topk_indices, exact, layout, k, margin)
        wrong, flips, rows = wrong + found.wrong, flips + found.flips, rows + found.rows
        worst_margin = max(worst_margin, margin)
        seen_by_layer.append({"layer": i, "wrong": found.wrong, "flips": found.flips, "margin": margin})
    measures = [
        Measure("wrong keys", float(wrong), 0.0, "keys"),
        Measure("flips within the margin", float(flips), None, "keys"),
        Measure("margin", worst_margin, None, "score"),
        Measure("rows", float(rows), None, "rows"),
    ]
    first = next((entry["layer"] for entry in seen_by_layer if entry["wrong"]), None)
    reason = "" if first is None else f"{wrong} keys are wrong beyond the margin, the first in layer {first}"
    if int((layout.bounds_BL2[..., 1] - layout.bounds_BL2[..., 0]).max()) <= k:
        reason = (
            f"no row sees more than index_topk = {k} keys, so that any selection is right: choose a larger --seq-len"
        )
    return Answer(
        measures, [NullCandidate(kind, ok) for kind, ok in rejected.items()], reason, {"layers": seen_by_layer}
    )


def judge_experts(
    chosen_BLT: torch.Tensor, exact_BLT: torch.Tensor, gaps_BL: torch.Tensor,
    real_BL: torch.Tensor, margin: float, n_experts: int,
) -> Verdicts:  # fmt: skip
    """Judge one layer's experts: rows whose gap exceeds the margin must have chosen the same set.

    Experts that are repeated or unknown are wrong in any row.
    """
    ordered = chosen_BLT.sort(-1).values
    same = (ordered == exact_BLT.sort(-1).values).all(-1)
    impossible = ((ordered < 0) | (ordered >= n_experts)).any(-1) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    clear = (gaps_BL > margin) | impossible
    return Verdicts(int((~same & clear & real_BL).sum()), int((~same & ~clear & real_BL).sum()), int(real_BL.sum()))


def expert_gaps(biased_BLX: torch.Tensor, n_group: int, topk_group: int, top: int) -> torch.Tensor:
    """How much scores may move before a row's experts change: half the group gap (it sums two), or the expert gap."""
    groups = biased_BLX.unflatten(-1, (n_group, -1))
    gap = torch.full(biased_BLX.shape[:-1], torch.inf, dtype=biased_BLX.dtype, device=biased_BLX.device)
    kept = torch.ones_like(groups[..., 0], dtype=torch.bool)
    if n_group > 1:
        order = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1).sort(dim=-1, descending=True)
        if topk_group < n_group:
            gap = (order.values[..., topk_group - 1] - order.values[..., topk_group]) / 2
        kept = torch.zeros_like(kept).scatter_(-1, order.indices[..., :topk_group], True)
    left = groups.masked_fill(~kept[..., None], -torch.inf).flatten(-2).sort(dim=-1, descending=True).values
    if top < left.shape[-1]:
        gap = torch.minimum(gap, left[..., top - 1] - left[..., top])
    return gap


def expert_margin(biased_BLX: torch.Tensor, low_BLX: torch.Tensor, real_BL: torch.Tensor) -> float:
    """The margin of one layer's router scores, from the reference's own error in low precision."""
    return MARGIN_FACTOR * float((low_BLX.double() - biased_BLX)[real_BL].abs().max())


def wrong_experts(
    biased_BLX: torch.Tensor, exact_BLT: torch.Tensor, config: DeepseekV32Config, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Null candidates: experts that every check of them must reject."""
    noise = torch.rand(biased_BLX.shape, generator=generator, dtype=torch.float64).to(biased_BLX)
    yield "random experts", noise.topk(exact_BLT.shape[-1], -1).indices
    if config.topk_group < config.n_group:
        yield "best experts of all groups", biased_BLX.topk(exact_BLT.shape[-1], -1).indices
    yield "the next row's experts", exact_BLT.roll(-1, 1)


def experts(bench: Bench) -> Answer:
    """Routed experts of every MoE layer."""
    config, real = bench.case.config, bench.case.real_BL.to(bench.device)
    generator = torch.Generator().manual_seed(bench.case.seed)
    wrong = flips = rows = 0
    first = None
    rejected: dict[str, bool] = {}
    assert bench.seen.decisions is not None
    assert bench.expected.decisions is not None
    for i, decision in enumerate(bench.seen.decisions):
        biased, low = bench.expected.router_BLX[i], bench.baseline.router_BLX[i]
        exact = bench.expected.decisions[i].expert_indices
        if biased is None or low is None or exact is None:
            continue
        if decision.expert_indices is None:
            return Answer([Measure("layers without experts", 1.0, 0.0)], [], f"layer {i} reports no experts")
        margin = expert_margin(biased, low, real)
        gaps = expert_gaps(biased, config.n_group, config.topk_group, config.num_experts_per_tok)
        found = judge_experts(decision.expert_indices, exact, gaps, real, margin, config.n_routed_experts)
        wrong, flips, rows = wrong + found.wrong, flips + found.flips, rows + found.rows
        first = i if found.wrong and first is None else first
        for kind, candidate in wrong_experts(biased, exact, config, generator):
            judged = judge_experts(candidate, exact, gaps, real, margin, config.n_routed_experts)
            rejected[kind] = rejected.get(kind, False) or judged.wrong > 0
    measures = [
        Measure("wrong rows", float(wrong), 0.0, "rows"),
        Measure("flips within the margin", float(flips), None, "rows"),
        Measure("rows", float(rows), None, "rows"),
    ]
    reason = "" if first is None else f"{wrong} rows chose other experts beyond the margin, the first in layer {first}"
    return Answer(measures, [NullCandidate(kind, ok) for kind, ok in rejected.items()], reason)


def free_run(bench: Bench) -> Answer:
    """The third verdict: both models choose for themselves. The LM loss is bounded by what plain low precision does."""
    expected, own, seen = (float(o.lm_loss) for o in (bench.oracle.free, bench.baseline_free, bench.free))

    def off(value: float) -> float:
        return abs(value - expected) / expected

    allowed = scalar_budget("free lm loss", bench.dtype, off(own))
    measures = [Measure("free lm loss", off(seen), allowed)]
    overlap = selection_overlap(bench)
    if overlap is not None:
        measures.append(Measure("keys in common", overlap, None, "share"))
    real = bench.case.real_BL.to(bench.device)
    spread = bench.free.logits[real].double() - bench.oracle.free.logits[real]
    size = bench.oracle.free.logits[real].square().mean().sqrt()
    measures.append(Measure("logits, rms", float(spread.square().mean().sqrt() / size), None))
    wrong = {"half a nat more": expected + 0.5, "half a nat less": expected - 0.5}
    return Answer(measures, [NullCandidate(kind, not off(value) <= allowed) for kind, value in wrong.items()])


def selection_overlap(bench: Bench) -> float | None:
    """Share of the oracle's selected keys that the subject's free run selects too; None in dense mode."""
    if bench.free.decisions is None:
        return None
    layout = layout_of(bench.case, bench.device)
    common = total = 0
    for mine, theirs in zip(bench.free.decisions, bench.oracle.tape, strict=True):
        if mine.topk_indices is None or theirs.topk_indices is None:
            return None
        a, b = (
            selected_mask(layout.to_slots(layout.from_relative(x)), layout.num_slots)
            for x in (mine.topk_indices, theirs.topk_indices)
        )
        common, total = common + int((a & b).sum()), total + int(b.sum())
    return common / max(total, 1)


_TAPE = frozenset({"tape"})
CHECKS = [
    Check("choices.keys", "choices", keys, _TAPE, modes=frozenset({"sparse"})),
    Check("choices.experts", "choices", experts, _TAPE),
    Check("choices.free_run", "choices", free_run, only_cases=frozenset({"text"})),
]
