"""Probes of positions: only distances count, and they do count, in attention and in the indexer (spec 1.5, A07, A08).

Letters: B batch, L rows, J indexer heads, E indexer head dim, R rope lanes, W vocabulary.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..cases import Case
from ..checks.base import State
from .model_budgets import FLIPS, KL_OF_ONE_ROW, POSITIONS, SHAPES
from .model_sides import Notes, Side, only_experts, probe, with_ids

# Up to here a shift moves index scores by rounding; far off, angles in fp32 move them by more than near ties.
NEAR = 1000
SHUFFLES = 16


def shift(side: Side, notes: Notes) -> None:
    """All positions moved by a constant: the same logits and KL loss, up to the rounding of angles to fp32."""
    model = side.model()
    case = side.case(length=3 * side.k)
    base = side.see(model, case, kl=True)
    position_BL = torch.arange(case.input_ids.shape[1]).expand_as(case.input_ids)
    moved_BL = position_BL.clone()
    moved_BL[:, -1] += 1
    moved = side.see(model, replace(case, position_ids=moved_BL), tape=only_experts(base.decisions), kl=True)
    for offset in (1, 641, 100_000):
        seen = side.see(model, replace(case, position_ids=position_BL + offset), tape=base.decisions, kl=True)
        name = f"by {offset}"
        notes.same(
            name, seen.logits.flatten(0, 1), base.logits.flatten(0, 1), side.positions,
            {"one token moved": (moved.logits.flatten(0, 1), base.logits.flatten(0, 1))},
        )  # fmt: skip
        if seen.kl_loss is not None and base.kl_loss is not None:
            notes.same(f"{name}, kl_loss", seen.kl_loss[None], base.kl_loss[None], POSITIONS)
        if offset < NEAR:
            notes.few_flips(name, seen.decisions, base.decisions, torch.ones_like(position_BL, dtype=torch.bool))


def without_rope(state: State, side: Side, indexer: bool) -> State:
    """The state with attention's rope keys 0, so that it cannot tell positions; `indexer`: its rope queries too."""
    config = side.config
    changed = dict(state)
    for name, weight in state.items():
        if name.endswith("kv_a_proj_with_mqa.weight"):
            changed[name] = weight.clone()
            changed[name][config.kv_lora_rank :] = 0
        elif indexer and name.endswith("indexer.wq_b.weight"):
            by_head = weight.clone().unflatten(0, (config.index_n_heads, config.index_head_dim))
            by_head[:, : config.qk_rope_head_dim] = 0
            changed[name] = by_head.flatten(0, 1)
    return changed


def last_row(side: Side, model: nn.Module, case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last row's logits `[B, W]`, and its KL: what it adds to the sum over the rows before it."""
    length = case.input_ids.shape[1]
    base = side.see(model, case)
    whole = side.see(model, case, tape=only_experts(base.decisions), kl=True)
    part = replace(case, input_ids=case.input_ids[:, :-1], labels=case.labels[:, :-1])
    before = side.see(model, part, kl=True)
    if whole.kl_loss is None or before.kl_loss is None:
        return whole.logits[:, -1], None
    return whole.logits[:, -1], (whole.kl_loss * length - before.kl_loss * (length - 1))[None]


def order(side: Side, notes: Notes) -> None:
    """Two tokens swapped, in one layer: the last row changes through rotary positions and through nothing else.

    As many tokens as there are keys to choose, so that every one is chosen. With the rope lanes of attention at 0 the
    last row's logits are the same, and the KL still changes; with those of the indexer at 0 too it does not.
    """
    length = side.k
    one_layer: dict[str, Any] = {"num_hidden_layers": 1, "index_topk": length}
    case = side.case(length=length, **one_layer)
    # Bytes of which none stands twice: swapping a byte for itself shows nothing.
    distinct = [torch.randperm(256, generator=side.generator(row))[:length] for row in range(len(case.input_ids))]
    case = with_ids(case, torch.stack(distinct))
    order_L = torch.arange(length)
    order_L[[2, length - 3]] = order_L[[length - 3, 2]]
    swapped = replace(case, input_ids=case.input_ids[:, order_L])
    seen, chosen = {}, {}
    for name, state in (
        ("rope", side.state),
        ("no rope in attention", without_rope(side.state, side, indexer=False)),
        ("no rope", without_rope(side.state, side, indexer=True)),
    ):
        model = side.model(state=state, **one_layer)
        seen[name] = [last_row(side, model, c) for c in (case, swapped)]
        chosen[name] = other_tokens_chosen(side, state, case)
    logits = {name: [run[0] for run in runs] for name, runs in seen.items()}
    kl = {name: [run[1] for run in runs if run[1] is not None] for name, runs in seen.items()}
    notes.same(
        "logits without rope", logits["no rope"][1], logits["no rope"][0], SHAPES,
        {"two tokens swapped": (logits["rope"][1], logits["rope"][0])},
    )  # fmt: skip
    if kl["no rope"]:
        notes.same("KL without rope", kl["no rope"][1], kl["no rope"][0], KL_OF_ONE_ROW, {
            "two tokens swapped, for the indexer": (kl["no rope in attention"][1], kl["no rope in attention"][0]),
        })  # fmt: skip
    if "tape" in side.can:
        notes.count("last rows that choose other tokens", "no rope", chosen["no rope"], FLIPS,
                    {"tokens in another order": chosen["rope"]})  # fmt: skip


def other_tokens_chosen(side: Side, state: State, case: Case) -> float:
    """How often one layer's last row chooses other tokens, among few, when those before it are shuffled."""
    if "tape" not in side.can:
        return 0.0
    length = case.input_ids.shape[1]
    few: dict[str, Any] = {"num_hidden_layers": 1, "index_topk": length // 3}
    model = side.model(state=state, **few)
    generator = side.generator()
    orders = [torch.arange(length)]
    for _ in range(SHUFFLES):
        orders.append(torch.cat((torch.randperm(length - 1, generator=generator), torch.tensor([length - 1]))))
    # All orders of both texts as one batch.
    ids = torch.cat([case.input_ids[:, order_L] for order_L in orders])
    decisions = side.see(model, replace(case, input_ids=ids, labels=ids, config=side.config_of(**few))).decisions
    assert decisions is not None
    keys = decisions[0].topk_indices
    assert keys is not None, "sparse mode reports its keys"
    # As tokens, not as places: of one byte that stands twice either is as good.
    found = ids.gather(1, keys[:, -1].long().cpu()).sort(-1).values.unflatten(0, (len(orders), -1))
    return float((found[1:] != found[:1]).any(-1).double().mean())


CHECKS = [probe("shift", shift), probe("order", order)]
