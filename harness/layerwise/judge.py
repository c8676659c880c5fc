"""Three runs of one layer as verdicts, a stage each: index scores, selection, attention, routing, feed-forward, output.

The fp64 reference says what is right, the reference in the run's dtype what that precision costs, and both together how
far the subject may be off (budgets.py). Every verdict says which wrong answers it was given, and that it rejected them.

Letters: B batch, L rows, S key slots, M hidden_size, X experts, T chosen experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from reference import DeepseekV32Config
from reference.layout import Layout, build_layout
from reports.schema import Measure, NullCandidate
from reports.strict_json import JSON

from ..budgets import MARGIN_FACTOR, budget
from ..checks.base import Answer
from ..checks.choices import expert_gaps, judge_experts, judge_keys, wrong_selections
from ..checks.parity import judge_tensor
from ..metrics import errors
from .layer import LayerRun

FAMILY = "layerwise"
# In the order of a forward: a fault in one stage is first seen there. The second is the stage's name in a report's table
# of errors by layer and stage; the output is the sum of what was handed on and the feed-forward part.
STAGES = {
    "index_scores": "index scores", "selection": "selection", "attention": "attention", "routing": "MoE", "ffn": "MoE",
    "output": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Runs:
    """One layer, three times: in fp64, in the run's dtype, and by the subject on what the first one chose."""

    config: DeepseekV32Config
    layer: int
    dtype: torch.dtype
    device: torch.device
    exact: LayerRun
    low: LayerRun
    seen: LayerRun
    seed: int

    @property
    def layout(self) -> Layout:
        """One document a row, no padding."""
        assert self.exact.output_BLM is not None
        batch, length, _ = self.exact.output_BLM.shape
        return build_layout(batch, length, self.device)


def stages_of(config: DeepseekV32Config, layer: int) -> tuple[str, ...]:
    """The stages that layer `layer` has: one with a dense feed-forward part routes nothing."""
    return tuple(stage for stage in STAGES if stage != "routing" or config.is_moe_layer(layer))


def judge(stage: str, runs: Runs) -> Answer | None:
    """What `stage` answers; None where the subject does not show it."""
    return _JUDGES[stage](runs)


def _index_scores(runs: Runs) -> Answer | None:
    """Raw I on every visible key."""
    if runs.seen.scores_BLS is None:
        return None
    visible = runs.layout.visible_BLS()
    exact, low, seen = (_held(run.scores_BLS).masked_fill(~visible, 0.0) for run in (runs.exact, runs.low, runs.seen))
    return _judged_tensor("layer index scores", runs, exact, low, seen)


def _selection(runs: Runs) -> Answer | None:
    """Keys, where the score is farther from the boundary than the margin."""
    layout, k = runs.layout, runs.config.index_topk
    exact, low = _held(runs.exact.scores_BLS), _held(runs.low.scores_BLS)
    visible = layout.visible_BLS()
    chosen = runs.seen.decisions.topk_indices
    if chosen is None:
        return Answer([Measure("layers without a selection", 1.0, 0.0)], [], "the subject reports no top-k indices")
    margin = MARGIN_FACTOR * float((low.double() - exact).masked_fill(~visible, 0.0).abs().max())
    found = judge_keys(chosen, exact, layout, k, margin)
    generator = torch.Generator().manual_seed(runs.seed)
    nulls = [
        NullCandidate(kind, judge_keys(candidate, exact, layout, k, margin).wrong > 0)
        for kind, candidate in wrong_selections(exact, layout, k, generator)
    ]
    reason = f"{found.wrong} keys are wrong beyond the margin" if found.wrong else ""
    if layout.num_slots <= k:
        reason = (
            f"no row sees more than index_topk = {k} keys, so that any selection is right: choose a larger --seq-len"
        )
    measures = [
        Measure("wrong keys", float(found.wrong), 0.0, "keys"),
        Measure("flips within the margin", float(found.flips), None, "keys"),
        Measure("margin", margin, None, "score"),
        Measure("rows", float(found.rows), None, "rows"),
    ]
    return Answer(measures, nulls, reason)


def _routing(runs: Runs) -> Answer | None:
    """Routed experts, where the scores are farther apart than the margin."""
    config = runs.config
    biased, low, exact = runs.exact.router_BLX, runs.low.router_BLX, runs.exact.decisions.expert_indices
    chosen = runs.seen.decisions.expert_indices
    assert biased is not None and low is not None and exact is not None
    if chosen is None:
        return Answer([Measure("layers without experts", 1.0, 0.0)], [], "the subject reports no experts")
    real = torch.ones(biased.shape[:2], dtype=torch.bool, device=biased.device)
    margin = MARGIN_FACTOR * float((low.double() - biased).abs().max())
    gaps = expert_gaps(biased, config.n_group, config.topk_group, config.num_experts_per_tok)
    found = judge_experts(chosen, exact, gaps, real, margin, config.n_routed_experts)
    generator = torch.Generator().manual_seed(runs.seed)
    noise = torch.rand(biased.shape, generator=generator, dtype=torch.float64).to(biased)
    candidates = {
        "random experts": noise.topk(exact.shape[-1], -1).indices,
        "the next row's experts": exact.roll(-1, 1),
    }
    if config.topk_group < config.n_group:
        candidates["best experts of all groups"] = biased.topk(exact.shape[-1], -1).indices
    nulls = [
        NullCandidate(kind, judge_experts(c, exact, gaps, real, margin, config.n_routed_experts).wrong > 0)
        for kind, c in candidates.items()
    ]
    measures = [
        Measure("wrong rows", float(found.wrong), 0.0, "rows"),
        Measure("flips within the margin", float(found.flips), None, "rows"),
        Measure("margin", margin, None, "score"),
        Measure("rows", float(found.rows), None, "rows"),
    ]
    return Answer(measures, nulls, f"{found.wrong} rows chose other experts beyond the margin" if found.wrong else "")


def _tensor(output: str, pick: Callable[[LayerRun], torch.Tensor | None]) -> Callable[[Runs], Answer | None]:
    def judged(runs: Runs) -> Answer | None:
        return _judged_tensor(output, runs, *(_held(pick(run)) for run in (runs.exact, runs.low, runs.seen)))

    return judged


def _judged_tensor(output: str, runs: Runs, exact: torch.Tensor, low: torch.Tensor, seen: torch.Tensor) -> Answer:
    allowed = budget(output, runs.dtype, errors(low, exact), exact.numel(), runs.device.type)
    measures, nulls = judge_tensor(seen, exact, allowed)
    return Answer(measures, nulls)


def _held(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "both references, and any subject that ran, have this part"
    return tensor


_JUDGES: dict[str, Callable[[Runs], Answer | None]] = {
    "index_scores": _index_scores,
    "selection": _selection,
    "attention": _tensor("layer attention", lambda run: run.attention_BLM),
    "routing": _routing,
    "ffn": _tensor("layer ffn", lambda run: run.ffn_BLM),
    "output": _tensor("layer output", lambda run: run.output_BLM),
}


def placed(stage: str, layer: int, answer: Answer) -> Iterator[dict[str, JSON]]:
    """The answer as reports place it: by layer and stage, the worst measure of those that have a budget."""
    name = STAGES[stage]
    judged = [measure for measure in answer.measures if measure.budget is not None]
    if name is not None and judged:
        worst = max(judged, key=lambda measure: measure.used or 0.0)
        yield {"layer": layer, "stage": name, "error": worst.value, "budget": worst.budget}
