"""Training: over 20 steps the loss falls in both models, and the two curves agree.

A falling loss alone proves nothing (it falls for 6 wrong indexers of 6); the curves are compared step by step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from reference import train_only_indexer
from reports.schema import Measure, NullCandidate

from ..budgets import CURVES, LEAST_FALL
from ..cases import Case, build_case
from ..subjects import resolve_subject
from .base import Answer, Bench, whole_model_check
from .whole import changed

STEPS = 20
BATCHES = 4
LEARNING_RATE = 2e-3
WARMUP_LEARNING_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which losses are minimised and who trains."""

    sparse: bool
    losses: tuple[str, ...]
    learning_rate: float
    indexer_only: bool = False


def train(model: nn.Module, cases: list[Case], recipe: Recipe) -> dict[str, list[float]]:
    """STEPS AdamW steps over `cases` in turn; the curve of each loss that is minimised, in nats."""
    if recipe.indexer_only:
        train_only_indexer(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=recipe.learning_rate, foreach=False
    )
    device = next(model.parameters()).device
    wants: dict[str, Any] = {"output_indexer_kl_loss": True} if "kl" in recipe.losses else {}
    curves: dict[str, list[float]] = {loss: [] for loss in recipe.losses}
    for step in range(STEPS):
        case = cases[step % len(cases)]
        out = model(**case.inputs(device), labels=case.labels.to(device), **wants)
        lm_loss = getattr(out, "lm_loss", None)
        parts = {"lm": out.loss if lm_loss is None else lm_loss, "kl": getattr(out, "indexer_kl_loss", None)}
        total = torch.stack(
            [parts[loss].to(torch.promote_types(parts[loss].dtype, torch.float32)) for loss in recipe.losses]
        ).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        for loss in recipe.losses:
            curves[loss].append(float(parts[loss].detach()))
    return curves


def apart(curve: list[float], other: list[float]) -> float:
    """Largest difference of two curves at the same step, as a share of the first value of `other`."""
    if len(curve) != len(other) or any(v != v for v in curve):
        return float("inf")
    return max(abs(a - b) for a, b in zip(curve, other, strict=True)) / abs(other[0])


def fall(curve: list[float]) -> float:
    """How far the mean of the last round over the batches lies below that of the first, as a share of the first."""
    first, last = (sum(part) / BATCHES for part in (curve[:BATCHES], curve[-BATCHES:]))
    return (first - last) / first


def curves_agree(recipe: Recipe) -> Callable[[Bench], Answer]:
    """A check that trains subject and reference by `recipe` from the same weights on the same text."""

    def check(bench: Bench) -> Answer:
        config = changed(bench.case.config, use_sparse_attention=recipe.sparse)
        batch, length = bench.case.input_ids.shape
        cases = [
            replace(
                build_case("text", config, seed=bench.case.seed * BATCHES + i, length=length, batch=batch),
                config=config,
            )
            for i in range(BATCHES)
        ]
        # What a subject does not compute, neither model minimises.
        losses = tuple(x for x in recipe.losses if x == "lm" or "indexer-kl" in bench.subject.capabilities)
        used = replace(recipe, losses=losses)
        reference = resolve_subject("reference")

        def reference_curves(dtype: torch.dtype) -> dict[str, list[float]]:
            return train(reference.build(config, bench.oracle.state, bench.device, dtype), cases, used)

        exact, own = reference_curves(torch.float64), reference_curves(bench.dtype)
        module = bench.build(config)
        seen = bench.of_subject(lambda: train(module, cases, used))
        measures, nulls = [], []
        for loss in losses:
            allowed = CURVES.factor * apart(own[loss], exact[loss]) + CURVES.floor
            measures.append(Measure(f"{loss}: curves apart", apart(seen[loss], exact[loss]), allowed))
            measures.append(Measure(f"{loss}: share not fallen", 1 - fall(seen[loss]), 1 - LEAST_FALL))
            e = exact[loss]
            for kind, wrong in (("4 % gain", [v * 1.04 for v in e]), ("one step behind", [e[0], *e[:-1]])):
                nulls.append(NullCandidate(f"{loss}: {kind}", not apart(wrong, e) <= allowed))
            nulls.append(NullCandidate(f"{loss}: nothing learnt", fall(e[:BATCHES] * (STEPS // BATCHES)) < LEAST_FALL))
        curves = {f"{bench.subject.name}, {loss}": seen[loss] for loss in losses}
        curves.update({f"reference, {loss}": own[loss] for loss in losses})
        return Answer(measures, nulls, data={"curves": curves})

    return check


CHECKS = [
    whole_model_check("training.sparse", "training", curves_agree(Recipe(True, ("lm", "kl"), LEARNING_RATE))),
    whole_model_check(
        "training.warmup",
        "training",
        curves_agree(Recipe(False, ("kl",), WARMUP_LEARNING_RATE, indexer_only=True)),
        frozenset({"indexer-kl", "dense-mode"}),
    ),
]
