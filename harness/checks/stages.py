"""Stages: where two models part, layer by layer, from the projections to the losses.

Every stage starts from the oracle's own values (replayed.py), so that an error shows in the layer and stage where it
arises, and in no later one. Nothing of a model shows its turned queries: so rotation is judged by a second forward in
which nothing turns. Index scores and attention are judged there, and what is wrong only with the rotation is RoPE's.

What a subject does not expose, because it has no such module or output, is left out by name.

Letters: N real rows, M channels, B batch, L rows, S key slots, R rope dim.
"""

import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from reference.layout import Layout
from reports.schema import Measure, NullCandidate
from reports.stages import STAGES

from ..budgets import budget
from ..metrics import SIDES, Errors, errors, null_candidates, rejected
from ..observe import Observation, observe
from ..replayed import ANGLES, HEADS, POINTS, Exposed, Key, Replay, Values, exposed, hooked, modules_of
from ..subjects import ALL
from .base import Answer, Bench, Check, NotExposed
from .choices import (
    Verdicts,
    expert_gaps,
    expert_margin,
    judge_experts,
    judge_keys,
    layout_of,
    score_margin,
    wrong_experts,
    wrong_selections,
)
from .parity import judge_scalar

SCORES, KEYS, EXPERTS = "index scores", "keys", "experts"
_NAMES = list(POINTS)
_TAPE = frozenset({"tape"})
TOO_WIDE = (
    "the activations of all stages and layers of three models do not fit beside a model of this size: "
    "run a smaller config for them"
)


class Part(NamedTuple):
    """One thing that is compared: its layer, None outside the layers, its stage, and its name."""

    layer: int | None
    stage: str
    name: str

    @property
    def order(self) -> tuple[float, int]:
        """Its place in a forward; what belongs to no layer comes at the end."""
        return (float("inf") if self.layer is None else self.layer, STAGES.index(self.stage))


@dataclass(frozen=True, slots=True)
class Finding:
    """An error and what is allowed of it; `side` says which of the five errors it is, or what it counts."""

    error: float
    allowed: float
    side: str

    @property
    def used(self) -> float:
        """The share of the budget; infinite for what is not a number, and for any error where none is allowed."""
        if self.error != self.error:
            return float("inf")
        if self.allowed == 0:
            return 0.0 if self.error == 0 else float("inf")
        return self.error / self.allowed


@dataclass(slots=True)
class Look:
    """What one model gave on the replayed states: with its rotation and, where that can be stopped, without any."""

    turned: Observation
    seen: Values
    still: Observation | None = None
    seen_still: Values = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standard:
    """What is expected of a subject that exposes certain points: all of it from the reference alone.

    values: what each stage starts from. nulls: null candidates by stage and kind, with the part that accepted one.
    """

    values: Values
    expected: Look
    baseline: Look
    parts: dict[Part, torch.Tensor]
    allowed: dict[Part, Errors]
    nulls: dict[tuple[str, str], Part | None]


def stages(bench: Bench) -> Answer:
    """Errors of every stage of every layer, as shares of their budgets."""
    layout, scores = layout_of(bench.case, bench.device), takes_scores(bench.module)
    offered = exposed_by(bench)
    if not offered.keys:
        raise NotExposed("no module with an official name gives a tensor of the reference's shape: no stage is seen")
    right = bench.oracle.remember(
        ("stages", offered.keys, scores), lambda: standard(bench, offered.keys, scores, layout)
    )
    capabilities = bench.subject.capabilities
    seen = bench.of_subject(lambda: look(bench.module, bench, offered.keys, capabilities, scores, right.values))
    found, unseen = judged(bench, seen, right, offered.keys, scores, layout)
    left_out = [*offered.lacks, *unseen]
    measures = []
    for stage in STAGES:
        used = [finding.used for part, finding in found.items() if part.stage == stage]
        measures += [Measure(f"{stage}, share of budget", max(used), 1.0)] if used else []
    beyond = next((part for part in sorted(found, key=lambda part: part.order) if found[part].used > 1), None)
    reason = f"left out: {'; '.join(left_out)}" if left_out else ""
    if beyond is not None:
        where = "" if beyond.layer is None else f" of layer {beyond.layer}"
        finding = found[beyond]
        reason = (
            f"the first stage beyond its budget is {beyond.stage}{where}: "
            f"{beyond.name}, {finding.side} {finding.error:.3g} of {finding.allowed:.3g}"
        )
    nulls = [
        NullCandidate(f"{kind} in {stage}", part is None, "" if part is None else f"accepted for {part.name}, layer {part.layer}")
        for (stage, kind), part in right.nulls.items()
    ]  # fmt: skip
    return Answer(measures, nulls, reason, {"stages": entries(found), "left_out": left_out})


def entries(found: dict[Part, Finding]) -> list[dict[str, object]]:
    """What a report draws: of every layer and stage the part that uses most of its budget, in the order of a forward."""
    worst: dict[tuple[int | None, str], Part] = {}
    for part in sorted(found, key=lambda part: part.order):
        held = worst.setdefault((part.layer, part.stage), part)
        if found[part].used > found[held].used:
            worst[part.layer, part.stage] = part
    return [
        {"layer": part.layer, "stage": part.stage, "error": found[part].error, "budget": found[part].allowed,
         "part": part.name, "side": found[part].side}
        for part in worst.values()
    ]  # fmt: skip


def takes_scores(model: nn.Module) -> bool:
    """Whether a forward of `model` can be asked for its index scores."""
    return "output_indexer_scores" in inspect.signature(model.forward).parameters


def exposed_by(bench: Bench) -> Exposed:
    """The points that the subject's modules show, found by a forward in which nothing is replaced."""

    def looked_at(model: nn.Module) -> Replay:
        lanes, keys = bench.case.config.qk_rope_head_dim, frozenset(modules_of(model))
        replay = Replay(keys, lanes, bench.dtype, touch=False)
        with hooked(model, replay):
            observe(model, bench.case, _TAPE, tape=bench.oracle.tape, gradients=False)
        return replay

    every = bench.oracle.remember("stages, all", lambda: looked_at(bench.oracle.model))
    own = bench.of_subject(lambda: looked_at(bench.module))
    batch, rows = bench.case.input_ids.shape
    return exposed(own, every, (batch, rows))


def look(
    model: nn.Module, bench: Bench, keys: frozenset[Key], capabilities: frozenset[str], scores: bool, values: Values
) -> Look:
    """Run `model` on `values`, which are filled with its own where they are not there yet."""

    def forward(rotated: bool, asked: frozenset[str]) -> tuple[Observation, Values]:
        replay = Replay(keys, bench.case.config.qk_rope_head_dim, bench.dtype, values, rotated)
        with hooked(model, replay):
            seen = observe(model, bench.case, asked, tape=bench.oracle.tape, gradients=False, scores=scores)
        return seen, replay.seen

    found = Look(*forward(True, capabilities))
    if ANGLES in keys:
        found.still, seen = forward(False, _TAPE)
        found.seen_still = {key: tensor for key, tensor in seen.items() if key[1] == HEADS}
    return found


def parts_of(found: Look, keys: frozenset[Key], scores: bool, layout: Layout) -> dict[Part, torch.Tensor]:
    """The tensors that are compared, `[N, M]` each."""
    real_BL, visible_BLS = layout.real_BL, layout.visible_BLS()
    parts: dict[Part, torch.Tensor] = {}

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(*real_BL.shape, -1)[real_BL]

    def of_visible(scores_BLS: torch.Tensor) -> torch.Tensor:
        return torch.where(visible_BLS, scores_BLS, 0.0)[real_BL]

    for layer, name in sorted(keys, key=lambda key: (-1 if key[0] is None else key[0], _NAMES.index(key[1]))):
        stage, tensor = POINTS[name].stage, found.seen[layer, name]
        if (layer, name) == ANGLES:
            parts[Part(0, stage, name)] = turned_since_the_start(tensor, layout)[real_BL]
        elif name == HEADS and found.still is not None:
            parts[Part(layer, "RoPE", name)] = rows(tensor)
            parts[Part(layer, stage, name)] = rows(found.seen_still[layer, name])
        else:
            # The embeddings are what layer 0 begins with.
            parts[Part(0 if layer is None and stage != "loss" else layer, stage, name)] = rows(tensor)
    for layer, turned in enumerate(found.turned.scores_BLS if scores else []):
        if found.still is not None:
            parts[Part(layer, "RoPE", SCORES)] = of_visible(turned)
            parts[Part(layer, SCORES, SCORES)] = of_visible(found.still.scores_BLS[layer])
        else:
            parts[Part(layer, SCORES, SCORES)] = of_visible(turned)
    parts[Part(None, "loss", "logits")] = found.turned.logits[real_BL]
    return parts


def turned_since_the_start(angles_BLR: torch.Tensor, layout: Layout) -> torch.Tensor:
    """How far each row is turned against the first of its document: cos and sin `[B, L, R]` of the difference.

    A model may count positions from wherever it likes: only differences enter a dot product.
    """
    wide = angles_BLR.double().expand(*layout.real_BL.shape, -1)
    start_BL = layout.order_BS.gather(1, layout.bounds_BL2[..., 0].clamp_max(layout.num_slots - 1))
    first = wide.gather(1, start_BL[..., None].expand_as(wide))
    (cos, sin), (cos0, sin0) = wide.chunk(2, -1), first.chunk(2, -1)
    return torch.cat((cos * cos0 + sin * sin0, sin * cos0 - cos * sin0), -1)


def standard(bench: Bench, keys: frozenset[Key], scores: bool, layout: Layout) -> Standard:
    """The oracle on its own rounded states, the baseline on the same, and what follows for a subject."""
    values: Values = {}
    expected = look(bench.oracle.model, bench, keys, ALL, True, values)
    baseline = look(bench.reference(), bench, keys, ALL, True, values)
    parts, own = (parts_of(found, keys, scores, layout) for found in (expected, baseline))
    allowed = {
        part: budget("stages", _precision(part, bench.dtype), errors(own[part], e), e.numel())
        for part, e in parts.items()
    }
    for found in (expected, baseline):
        # The oracle keeps what follows for every subject, and these are the largest of it.
        found.seen, found.seen_still = {}, {}
    right = Standard(values, expected, baseline, parts, allowed, {})
    for part, tensor in parts.items():
        for kind, wrong in null_candidates(tensor):
            note(right, part, kind, rejected(wrong, tensor, allowed[part]))
    generator = torch.Generator().manual_seed(bench.case.seed)
    for layer in range(len(bench.oracle.tape)):
        exact = expected.turned.scores_BLS[layer]
        for kind, chosen in wrong_selections(exact, layout, bench.case.config.index_topk, generator):
            wrong_keys = keys_of(bench, right, chosen, layer, layout).wrong
            note(right, Part(layer, "selection", KEYS), kind, wrong_keys > 0)
    for kind, of_layers in _wrong_experts(bench, right, layout, generator).items():
        # Where the margin is wide, one layer may leave too few clear rows.
        note(right, Part(None, "MoE", EXPERTS), kind, any(of_layers))
    for loss in ("lm", "kl"):
        for null in loss_of(bench, expected.turned, right, loss)[1]:
            note(right, Part(None, "loss", f"{loss} loss"), null.kind, null.rejected)
    return right


def _wrong_experts(bench: Bench, right: Standard, layout: Layout, generator: torch.Generator) -> dict[str, list[bool]]:
    rejected_in: dict[str, list[bool]] = {}
    assert right.expected.turned.decisions is not None
    for layer, biased_BLX in enumerate(right.expected.turned.router_BLX):
        exact_BLT = right.expected.turned.decisions[layer].expert_indices
        if biased_BLX is None or exact_BLT is None:
            continue
        for kind, chosen in wrong_experts(biased_BLX, exact_BLT, bench.case.config, generator):
            rejected_in.setdefault(kind, []).append(experts_of(bench, right, chosen, layer, layout).wrong > 0)
    return rejected_in


def _precision(part: Part, dtype: torch.dtype) -> torch.dtype:
    """Index scores are computed in at least fp32 whatever their inputs are."""
    return torch.float32 if part.stage == SCORES else dtype


def note(right: Standard, part: Part, kind: str, was_rejected: bool) -> None:
    """Write down what became of one null candidate; those of one kind and stage are rejected for every part, or not."""
    held = right.nulls.get((part.stage, kind))
    right.nulls[part.stage, kind] = part if held is None and not was_rejected else held


def keys_of(
    bench: Bench, right: Standard, chosen_BLK: torch.Tensor, layer: int, layout: Layout, turned: bool = True
) -> Verdicts:
    """Judge keys that one layer chose on the replayed states."""
    exact, low = right.expected.turned, right.baseline.turned
    if not turned:
        assert right.expected.still is not None and right.baseline.still is not None
        exact, low = right.expected.still, right.baseline.still
    scores_BLS = exact.scores_BLS[layer]
    margin = score_margin(scores_BLS, low.scores_BLS[layer])
    return judge_keys(chosen_BLK, scores_BLS, layout, bench.case.config.index_topk, margin)


def experts_of(bench: Bench, right: Standard, chosen_BLT: torch.Tensor, layer: int, layout: Layout) -> Verdicts:
    """Judge experts that one layer chose on the replayed states."""
    config, exact = bench.case.config, right.expected.turned
    biased_BLX, low_BLX = exact.router_BLX[layer], right.baseline.turned.router_BLX[layer]
    assert biased_BLX is not None and low_BLX is not None and exact.decisions is not None
    experts_BLT = exact.decisions[layer].expert_indices
    assert experts_BLT is not None
    gaps_BL = expert_gaps(biased_BLX, config.n_group, config.topk_group, config.num_experts_per_tok)
    margin = expert_margin(biased_BLX, low_BLX, layout.real_BL)
    return judge_experts(chosen_BLT, experts_BLT, gaps_BL, layout.real_BL, margin, config.n_routed_experts)


def loss_of(bench: Bench, seen: Observation, right: Standard, loss: str) -> tuple[Measure, list[NullCandidate]]:
    """Judge the "lm" or the "kl" loss on the replayed states."""
    actual, expected, own = (getattr(o, f"{loss}_loss") for o in (seen, right.expected.turned, right.baseline.turned))
    return judge_scalar(actual, expected, own, f"{loss} loss", bench.dtype)


def judged(
    bench: Bench, seen: Look, right: Standard, keys: frozenset[Key], scores: bool, layout: Layout
) -> tuple[dict[Part, Finding], list[str]]:
    """What was found of every part, and by name what could not be looked at."""
    parts = parts_of(seen, keys, scores, layout)
    found = {part: worst_side(errors(parts[part], e), right.allowed[part]) for part, e in right.parts.items()}
    left_out = [] if scores else [f"{SCORES} (forward takes no output_indexer_scores)"]
    if seen.still is None:
        left_out.append("RoPE (nothing stops it, so that it is judged with index scores and attention)")
    assert seen.turned.decisions is not None
    for layer, decision in enumerate(seen.turned.decisions):
        if decision.topk_indices is None:
            left_out.append(f"{KEYS} of layer {layer} (it reports none)")
            continue
        wrong = keys_of(bench, right, decision.topk_indices, layer, layout).wrong
        found[Part(layer, "selection", KEYS)] = Finding(float(wrong), 0.0, "wrong keys")
        if not scores and seen.still is not None:
            # Without scores, keys that are wrong only with the rotation are what is seen of the indexer's RoPE.
            assert seen.still.decisions is not None
            flat = seen.still.decisions[layer].topk_indices
            if flat is not None and keys_of(bench, right, flat, layer, layout, turned=False).wrong == 0:
                found[Part(layer, "RoPE", KEYS)] = Finding(float(wrong), 0.0, "wrong keys")
    for layer, decision in enumerate(seen.turned.decisions):
        if right.expected.turned.router_BLX[layer] is None:
            continue
        if decision.expert_indices is None:
            left_out.append(f"{EXPERTS} of layer {layer} (it reports none)")
            continue
        wrong = experts_of(bench, right, decision.expert_indices, layer, layout).wrong
        found[Part(layer, "MoE", EXPERTS)] = Finding(float(wrong), 0.0, "rows with other experts")
    for loss in ("lm", "kl"):
        if getattr(seen.turned, f"{loss}_loss") is None:
            left_out.append(f"{loss} loss (the subject does not declare it)")
            continue
        measure, _ = loss_of(bench, seen.turned, right, loss)
        assert measure.budget is not None
        found[Part(None, "loss", measure.name)] = Finding(measure.value, measure.budget, "share of itself")
    for part in [part for part in found if part.stage == "RoPE"]:
        # The same thing without any rotation, which is an error of another stage.
        other = next((p for p in found if p[::2] == part[::2] and p.stage not in ("RoPE", "selection")), None)
        if other is not None and found[other].used > 1:
            del found[part]
            left_out.append(f"RoPE in {part.name} of layer {part.layer} (they are wrong without rotation too)")
    return found, left_out


def worst_side(found: Errors, allowed: Errors) -> Finding:
    """The side that uses most of its budget."""
    sides = [Finding(getattr(found, side), getattr(allowed, side), side) for side in SIDES]
    return max(sides, key=lambda finding: finding.used)


CHECKS = [
    Check(
        "parity.stages", "parity", stages, _TAPE, frozenset({"sparse"}),
        frozenset({"text", "left-padded", "packed"}), too_large=TOO_WIDE,
    ),
]  # fmt: skip
