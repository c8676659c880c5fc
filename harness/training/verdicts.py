"""What a training run is judged by, beside the audit: finite losses, information in the indexer, rows that differ.

Each verdict lists the wrong answers that it was given, and that it rejected them.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from reports.schema import Measure, NullCandidate, Status, Verdict
from reports.strict_json import JSON

from ..budgets import MOST_COLLAPSE, NO_INFORMATION
from ..runner import status_of
from .data import Batch
from .metrics import captured_of, choice, divergences, measure_indexer
from .stages import Stage

FAMILY = "train"
LOSSES = ("lm_loss", "kl_loss")


def not_finite(values: Mapping[str, JSON]) -> str | None:
    """The first loss or gradient norm of a step that is NaN or infinite, by name; None when all are finite."""
    norms = {f"gradient norm of {group}": norm for group, norm in values.get("gradient_norms", {}).items()}
    found = {name: values[name] for name in LOSSES if values.get(name) is not None} | norms
    return next((name for name, value in found.items() if not math.isfinite(value)), None)


def not_working(quality: Mapping[str, JSON]) -> str | None:
    """Why an indexer in training does not work, by the values of `IndexerQuality.values()`; None when it does."""
    if not 1 - quality["captured"] <= NO_INFORMATION:
        return (
            f"the indexer tells no more than a uniform guess (captured {quality['captured']:.3g}, "
            "1 − KL / KL of a uniform predictor; it must be above 0)"
        )
    if quality.get("collapse") is not None and not quality["collapse"] <= MOST_COLLAPSE:
        return (
            f"the selection collapsed: in one layer the rows select the same keys where attention does not (collapse "
            f"{quality['collapse']:.3g}, 0 for the best selection, at most {MOST_COLLAPSE})"
        )
    return None


def judge_losses(
    subject: str, stage: Stage, steps: Iterable[Mapping[str, JSON]], done: int, problem: str | None = None
) -> Verdict:
    """`train.losses`: the stage came to its end, and every loss and gradient norm of `steps` is finite.

    `done`: steps done in all, by this process and those before; `problem`: why it ended early.
    """
    rows = list(steps)
    measures = [
        Measure(
            "steps with a loss or gradient that is not finite", sum(not_finite(row) is not None for row in rows), 0
        ),
        Measure("steps left undone", stage.steps - done, 0),
    ]
    last = rows[-1] if rows else {}
    measures += [Measure(f"{name}, last", last[name], unit="nats") for name in LOSSES if last.get(name) is not None]
    spoilt: list[tuple[str, dict[str, JSON]]] = [
        ("NaN in the LM loss", {"lm_loss": math.nan}),
        ("infinite KL", {"lm_loss": 1.0, "kl_loss": math.inf}),
        ("NaN in a gradient", {"lm_loss": 1.0, "gradient_norms": {"indexer": math.nan}}),
    ]
    nulls = [NullCandidate(kind, not_finite(row) is not None) for kind, row in spoilt]
    return Verdict(
        "train.losses", FAMILY, subject, stage.name, status_of(measures, nulls), reason=problem or "",
        measures=tuple(measures), nulls=tuple(nulls),
    )  # fmt: skip


def judge_indexer(model: nn.Module, stage: Stage, batch: Batch) -> list[Verdict]:
    """`train.captured` and `train.selection`: the trained indexer tells more than a uniform guess, and its rows differ.

    The wrong answers are scores in place of the model's own, on the same batch: constant ones, and reversed ones.
    """
    subject, k = type(model).__name__, cast(Any, model).config.index_topk
    told: dict[str, float] = {}
    alone: list[float | None] = []

    # In the candidate set of the stage, where its KL is.
    def wrong_scores(layer: int, scores_BRS: Tensor, p_BRS: Tensor) -> None:
        if layer == 0:
            for kind, wrong in (("constant scores", _constant(scores_BRS)), ("reversed scores", _reversed(p_BRS))):
                told[kind] = captured_of(*divergences(wrong, p_BRS))

    # By the rule of ties constant scores select the first keys in every row.
    def one_choice(layer: int, scores_BRS: Tensor, p_BRS: Tensor) -> None:
        if layer == 0:
            alone.append(choice(_constant(scores_BRS), p_BRS, k)[-1])

    quality = measure_indexer(model, batch, sparse=stage.sparse, candidates=wrong_scores, visible=one_choice)
    values = quality.values()
    captured = [Measure("KL / KL of a uniform predictor", 1 - values["captured"], NO_INFORMATION)]
    captured += [Measure("KL of a uniform predictor", values["uniform_kl"], unit="nats")]
    nulls = [
        NullCandidate(kind, not 1 - value <= NO_INFORMATION, f"captured {value:.3g}") for kind, value in told.items()
    ]
    found = [_verdict("train.captured", subject, stage, captured, nulls, values)]
    if quality.collapse is None:
        reason = f"no pair of rows has more than {k} visible keys (index_topk): every row selects all it sees"
        return [*found, Verdict("train.selection", FAMILY, subject, stage.name, Status.SKIPPED, reason=reason)]
    selection = [Measure("same keys in all rows, beyond attention's own", quality.collapse, MOST_COLLAPSE)]
    selection += [Measure(name, values[name]) for name in ("same", "recall", "left_out")]
    (alike,) = alone
    nulls = [
        NullCandidate("constant scores", alike is not None and not alike <= MOST_COLLAPSE, f"collapse {alike:.3g}")
    ]
    return [*found, _verdict("train.selection", subject, stage, selection, nulls, values)]


def _verdict(
    check: str, subject: str, stage: Stage, measures: list[Measure], nulls: list[NullCandidate], values: dict[str, JSON]
) -> Verdict:  # fmt: skip
    status = status_of(measures, nulls)
    reason = (not_working(values) or "") if status is Status.FAILED else ""
    return Verdict(
        check, FAMILY, subject, stage.name, status, reason=reason, measures=tuple(measures), nulls=tuple(nulls),
        data={"indexer": values},
    )  # fmt: skip


def _constant(scores_BLS: Tensor) -> Tensor:
    return torch.where(scores_BLS == -torch.inf, -torch.inf, torch.ones_like(scores_BLS))


def _reversed(target_BLS: Tensor) -> Tensor:
    """The best scores there are, log p, with their sign changed."""
    return torch.where(target_BLS > 0, -target_BLS.double().log(), -torch.inf)
