"""Training: over 12 steps the loss falls in both models, and the two curves agree.

A falling loss alone proves nothing (it falls for 6 wrong indexers of 6); the curves are compared step by step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from reference import Decisions, train_only_indexer
from reports.schema import Measure, NullCandidate

from ..budgets import CURVES, LEAST_FALL
from ..cases import Case, build_case
from ..subjects import resolve_subject
from .base import Answer, Bench, whole_model_check
from .whole import changed, shallow, weights_for

STEPS = 12
BATCHES = 4
LENGTH_PER_KEY = 3
LEARNING_RATE = 2e-3
WARMUP_LEARNING_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which losses are minimised and who trains."""

    sparse: bool
    losses: tuple[str, ...]
    learning_rate: float
    indexer_only: bool = False


@dataclass(slots=True)
class Trained:
    """The curve of each loss that was minimised, in nats, and each step's choices."""

    curves: dict[str, list[float]]
    tapes: list[Decisions | None]


def train(model: nn.Module, cases: list[Case], recipe: Recipe, *, tapes: list[Decisions | None] | None = None,
          record: bool = False) -> Trained:  # fmt: skip
    """STEPS AdamW steps over `cases` in turn, replaying `tapes` step by step when they are given."""
    if recipe.indexer_only:
        train_only_indexer(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, foreach=False)
    device = next(model.parameters()).device
    wants: dict[str, Any] = {"output_indexer_kl_loss": True} if "kl" in recipe.losses else {}
    if record:
        wants["output_decisions"] = True
    found = Trained({loss: [] for loss in recipe.losses}, [])
    for step in range(STEPS):
        case = cases[step % len(cases)]
        replayed = {} if tapes is None or tapes[step] is None else {"decisions": tapes[step]}
        out = model(**case.inputs(device), labels=case.labels.to(device), **wants, **replayed)
        lm_loss = getattr(out, "lm_loss", None)
        parts = {"lm": out.loss if lm_loss is None else lm_loss, "kl": getattr(out, "indexer_kl_loss", None)}
        total = sum(parts[loss] for loss in recipe.losses)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        for loss in recipe.losses:
            found.curves[loss].append(float(parts[loss].detach()))
        found.tapes.append(out.decisions if record else None)
    return found


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
    """A check that trains subject and reference by `recipe` from the same weights on the same text.

    Twice: on the tape of the fp64 reference, step by step, where the curves must agree to rounding; and choosing for
    itself, where the loss must fall. Without the tape one flipped key sends two right models apart (fp32, 12 steps:
    up to 3 % of the KL).
    """

    def check(bench: Bench) -> Answer:
        config = changed(shallow(bench.case.config), use_sparse_attention=recipe.sparse)
        state = weights_for(config, bench.oracle.state)
        batch, length = bench.case.input_ids.shape
        # Long enough to select from; what more rows would show, the other checks see.
        length = min(length, LENGTH_PER_KEY * config.index_topk)
        cases = [
            replace(
                build_case("text", config, seed=bench.case.seed * BATCHES + i, length=length, batch=batch),
                config=config,
            )
            for i in range(BATCHES)
        ]
        capabilities = bench.subject.capabilities
        # What a subject does not compute, neither model minimises.
        used = replace(recipe, losses=tuple(x for x in recipe.losses if x == "lm" or "indexer-kl" in capabilities))
        reference = resolve_subject("reference")

        def reference_model(dtype: torch.dtype) -> nn.Module:
            return reference.build(config, state, bench.device, dtype)

        exact = bench.oracle.remember(
            (used, "exact"), lambda: train(reference_model(torch.float64), cases, used, record=True)
        )
        own = bench.oracle.remember(
            (used, "own"), lambda: train(reference_model(bench.dtype), cases, used, tapes=exact.tapes).curves
        )

        def of_subject(tapes: list[Decisions | None] | None) -> dict[str, list[float]]:
            model = bench.subject.build(config, state, bench.device, bench.dtype)
            return train(model, cases, used, tapes=tapes).curves

        taped = bench.of_subject(lambda: of_subject(exact.tapes))
        free = bench.of_subject(lambda: of_subject(None))
        measures, nulls = [], []
        for loss in used.losses:
            e = exact.curves[loss]
            allowed = CURVES.factor * apart(own[loss], e) + CURVES.floor
            measures.append(Measure(f"{loss}: curves apart", apart(taped[loss], e), allowed))
            measures.append(Measure(f"{loss}: share not fallen", 1 - fall(free[loss]), 1 - LEAST_FALL))
            measures.append(Measure(f"{loss}: reference, not fallen", 1 - fall(e), 1 - LEAST_FALL))
            measures.append(Measure(f"{loss}: apart when free", apart(free[loss], e)))
            for kind, wrong in (("4 % gain", [v * 1.04 for v in e]), ("one step behind", [e[0], *e[:-1]])):
                nulls.append(NullCandidate(f"{loss}: {kind}", not apart(wrong, e) <= allowed))
            nulls.append(NullCandidate(f"{loss}: nothing learnt", fall(e[:BATCHES] * (STEPS // BATCHES)) < LEAST_FALL))
        curves = {f"{bench.subject.name}, {loss}": free[loss] for loss in used.losses}
        curves.update({f"reference, {loss}": exact.curves[loss] for loss in used.losses})
        return Answer(measures, nulls, data={"curves": curves})

    return check


CHECKS = [
    whole_model_check(
        "training.sparse", "training", curves_agree(Recipe(True, ("lm", "kl"), LEARNING_RATE)), frozenset({"tape"})
    ),
    whole_model_check(
        "training.warmup",
        "training",
        curves_agree(Recipe(False, ("kl",), WARMUP_LEARNING_RATE, indexer_only=True)),
        frozenset({"indexer-kl", "dense-mode", "tape"}),
    ),
]
