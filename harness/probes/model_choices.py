"""Probes of the discrete choices: what they depend on, and what depends on them (spec 1.7, 2, E04, B04).

Letters: B batch, L rows, K chosen keys, T chosen experts, X experts, W vocabulary.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from reference import Decisions, LayerDecisions

from ..cases import Case
from ..checks.base import State
from .model_budgets import CONTENT, FLIPS
from .model_sides import (
    Notes,
    Side,
    only_experts,
    probe,
    unreachable,
)  # fmt: skip


def other_choices(tape: Decisions, case: Case, experts: int, generator: torch.Generator) -> Decisions:
    """A tape that is as legal as `tape` and has little to do with it: random keys of as many, random experts."""
    layers = []
    for layer in tape:
        keys, chosen = layer.topk_indices, layer.expert_indices
        if keys is not None:
            width = keys.shape[-1]
            # A row of an unpacked, unpadded text sees as many keys as its position says.
            noise = torch.rand((*keys.shape[:2], case.input_ids.shape[1]), generator=generator)
            hidden = torch.ones(noise.shape[1:], dtype=torch.bool).triu(1)
            order = noise.masked_fill(hidden, 2.0).argsort(-1)[..., :width].to(keys)
            keys = torch.where(keys < 0, -1, order).sort(-1).values
            keys = torch.where(keys < 0, torch.iinfo(keys.dtype).max, keys).sort(-1).values
            keys = keys.masked_fill(keys == torch.iinfo(keys.dtype).max, -1)
        if chosen is not None:
            noise = torch.rand((*chosen.shape[:2], experts), generator=generator)
            chosen = noise.topk(chosen.shape[-1], -1).indices.sort(-1).values.to(chosen)
        layers.append(LayerDecisions(keys, chosen))
    return Decisions(tuple(layers))


def mixed(keys: Decisions, experts: Decisions) -> Decisions:
    """The keys of one tape and the experts of another."""
    pairs = zip(keys, experts, strict=True)
    return Decisions(tuple(LayerDecisions(one.topk_indices, other.expert_indices) for one, other in pairs))


def tape(side: Side, notes: Notes) -> None:
    """What a model reports as its choices is what it used; a tape is used, and does not become its own choice."""
    generator = side.generator()
    for sparse in side.modes:
        model = side.model(use_sparse_attention=sparse)
        case = side.case(length=3 * side.k, use_sparse_attention=sparse)
        free = side.see(model, case)
        assert free.decisions is not None
        again = side.see(model, case, tape=free.decisions)
        elsewhere = other_choices(free.decisions, case, side.config.n_routed_experts, generator)
        tapes = {"other experts": mixed(free.decisions, elsewhere)}
        if sparse:
            tapes["other keys"] = mixed(elsewhere, free.decisions)
        others = {kind: side.see(model, case, tape=new) for kind, new in tapes.items()}
        mode = "sparse" if sparse else "dense"
        notes.same(
            f"{mode}, replayed", again.logits.flatten(0, 1), free.logits.flatten(0, 1), CONTENT,
            {kind: (seen.logits.flatten(0, 1), free.logits.flatten(0, 1)) for kind, seen in others.items()},
        )  # fmt: skip
        every_BL = torch.ones_like(case.input_ids, dtype=torch.bool)
        notes.few_flips(f"{mode}, replayed", again.decisions, free.decisions, every_BL)
        notes.count("unreachable keys", mode, unreachable(free.decisions, case, side.device), 0.0)
        if sparse:
            replayed = others["other keys"].decisions
            assert replayed is not None
            # The first layer has seen no choice yet.
            first, own = (Decisions((LayerDecisions(d[0].topk_indices),)) for d in (replayed, free.decisions))
            notes.few_flips("sparse, other keys", first, own, every_BL)


def nested(side: Side, notes: Notes) -> None:
    """On the same states, what is chosen among few is chosen among more: index_topk k/4, k/2, k, 2k."""
    case = side.case(length=4 * side.k)
    free = side.see(side.model(), case)
    generator = side.generator()
    sizes = sorted({max(side.k // 4, 1), max(side.k // 2, 1), side.k, 2 * side.k})
    chosen = []
    for k in sizes:
        seen = side.see(side.model(index_topk=k), replace(case, config=side.config), tape=free.decisions)
        assert seen.decisions is not None
        chosen.append([layer.topk_indices for layer in seen.decisions])
    visible_L = torch.arange(1, case.input_ids.shape[1] + 1)
    for k, layers in zip(sizes, chosen, strict=True):
        counts = [(keys >= 0).sum(-1).cpu() for keys in layers if keys is not None]
        wrong, most = (sum(int((n != visible_L.clamp_max(m)).sum()) for n in counts) for m in (k, k + 1))
        notes.count("rows with another number of keys", f"{k} keys", float(wrong), 0.0, {"one key fewer": float(most)})
    for i, (few, many) in enumerate(pairwise(chosen)):
        outside = total = scattered = 0
        for a, b in zip(few, many, strict=True):
            assert a is not None and b is not None, "sparse mode reports its keys"
            found = (a[..., :, None] == b[..., None, :]).any(-1) | (a < 0)
            outside, total = outside + int((~found).any(-1).sum()), total + found[..., 0].numel()
            noise = (torch.rand(a.shape, generator=generator) * visible_L[:, None]).to(a)
            scattered += int((~(noise[..., :, None] == b[..., None, :]).any(-1)).any(-1).sum())
        where = f"{sizes[i]} of {sizes[i + 1]} keys"
        notes.count("rows not nested", where, outside / total, FLIPS, {"random keys": scattered / total})


def lengths(side: Side, notes: Notes) -> None:
    """Rows that see no more than index_topk keys are those of dense attention, and the first that sees one more is not."""
    case = side.case(length=3 * side.k)
    sparse = side.see(side.model(), case)
    dense = side.see(
        side.model(use_sparse_attention=False),
        replace(case, config=side.config),
        tape=only_experts(sparse.decisions),
    )
    k = side.k
    nulls = {"rows behind k": (sparse.logits[:, k:].flatten(0, 1), dense.logits[:, k:].flatten(0, 1))}
    if "tape" in side.can:
        # The first row that sees k + 1 keys drops one of them: too little to see where choices may flip.
        one_more = (seen.logits[:, : k + 1].flatten(0, 1) for seen in (sparse, dense))
        nulls["row k + 1"] = next(one_more), next(one_more)
    rows_NW, dense_NW = (seen.logits[:, :k].flatten(0, 1) for seen in (sparse, dense))
    notes.same("rows up to k", rows_NW, dense_NW, side.shapes, nulls)


def equal_experts(state: State) -> State:
    """The state with the weights of expert 0 in every routed expert."""
    return {
        name: t[:1].expand_as(t).clone() if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else t
        for name, t in state.items()
    }


def routed_weights(side: Side, notes: Notes) -> None:
    """Routed weights sum to routed_scaling_factor: among equal experts any routing is the same, and twice the factor
    on halves of the experts is the same."""  # fmt: skip
    case = side.case(length=2 * side.k)
    fields: dict[str, Any] = {"norm_topk_prob": True}
    model = side.model(state=equal_experts(side.state), **fields)
    free = side.see(model, case)
    assert free.decisions is not None
    elsewhere = other_choices(free.decisions, case, side.config.n_routed_experts, side.generator())
    rerouted = mixed(free.decisions, elsewhere)
    seen = side.see(model, case, tape=rerouted)
    unequal = side.model(**fields)
    unequal_free = side.see(unequal, case, tape=free.decisions)
    unequal_seen = side.see(unequal, case, tape=rerouted)
    notes.same(
        "equal experts", seen.logits.flatten(0, 1), free.logits.flatten(0, 1), side.shapes,
        {"unequal experts": (unequal_seen.logits.flatten(0, 1), unequal_free.logits.flatten(0, 1))},
    )  # fmt: skip
    doubled = {**fields, "routed_scaling_factor": 2 * side.config.routed_scaling_factor}
    halves = {n: t / 2 if n.endswith("experts.down_proj") else t for n, t in side.state.items()}
    scaled = side.see(side.model(state=halves, **doubled), case, tape=free.decisions)
    only_factor = side.see(side.model(**doubled), case, tape=free.decisions)
    notes.same(
        "twice the factor, half the experts", scaled.logits.flatten(0, 1), unequal_free.logits.flatten(0, 1),
        CONTENT, {"twice the factor": (only_factor.logits.flatten(0, 1), unequal_free.logits.flatten(0, 1))},
    )  # fmt: skip


def choice_only(side: Side, notes: Notes) -> None:
    """The router's bias and the indexer's weights choose, and do nothing else: on a tape, other ones change nothing."""
    case = side.case(length=3 * side.k)
    base = side.see(side.model(), case)
    generator = side.generator()
    for what, part in (("router bias", "e_score_correction_bias"), ("indexer", ".indexer.")):
        state = {
            n: t + torch.randn(t.shape, generator=generator) * t.std() if part in n else t
            for n, t in side.state.items()
        }
        model = side.model(state=state)
        taped = side.see(model, case, tape=base.decisions)
        free = side.see(model, case)
        notes.same(
            what, taped.logits.flatten(0, 1), base.logits.flatten(0, 1), CONTENT,
            {"other choices": (free.logits.flatten(0, 1), base.logits.flatten(0, 1))},
        )  # fmt: skip


_TAPE = frozenset({"tape"})
CHECKS = [
    probe("tape", tape, _TAPE),
    probe("nested", nested, _TAPE),
    probe("lengths", lengths, {"dense-mode"}),
    probe("routed_weights", routed_weights, _TAPE),
    probe("choice_only", choice_only, _TAPE),
]
