"""Who gets gradient from which loss, before a stage's first step: the table as found, as it must be, and the verdict.

Rows are groups of parameters, the two factors of adapters by themselves; answers are exactly none, zero, finite and not
all zero, or not finite.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reference.outputs import CausalLMOutput
from reference.training import GROUPS, parameter_group, training_loss
from reports.schema import Measure, NullCandidate, Verdict
from reports.strict_json import JSON

from ..runner import status_of
from .data import Batch
from .ranks import largest_values, own_rows, ranks_of
from .stages import Stage

Gradient = Literal["none", "zero", "finite", "not finite"]


def table_group(name: str) -> str:
    """The row of the gradient table that a parameter stands in: its group, and which factor of an adapter it is."""
    factor = next((f", LoRA {x}" for x in "AB" if f".lora_{x}." in name), "")
    return parameter_group(name) + factor


def gradient_of(grad: Tensor | None) -> Gradient:
    """None, all zero, finite and not all zero, or not finite."""
    if grad is None:
        return "none"
    return kind_of(float(grad.detach().abs().max()) if grad.numel() else 0.0)


def kind_of(largest: float) -> Gradient:
    """The same, from the largest absolute value of a gradient that is there."""
    if not largest < math.inf:
        return "not finite"
    return "finite" if largest > 0 else "zero"


def gradient_table(model: nn.Module, stage: Stage, batch: Batch) -> dict[str, JSON]:
    """Who gets gradient from which loss of a stage: none, zero, finite, not finite, or mixed within a group.

    Columns: the LM loss, the KL where the stage computes it, and what the stage minimises. The model stands as it will
    train: mode set, adapters on, the rest frozen. The result is what `Verdict.data["gradient_table"]` holds.
    """
    columns = ["LM loss", *(["KL"] if stage.trains != "model" else []), "what is minimised"]
    named = list(model.named_parameters())
    training = {name: parameter for name, parameter in named if parameter.requires_grad}
    rows: dict[str, dict[str, str]] = {}
    # One graph for all losses, where gradients can be asked for without a backward.
    out = model(**model_inputs(model, stage, batch)) if ranks_of(model) is None else None
    for column in columns:
        if out is None:
            answers = _answers_of_ranks(model, column, stage, batch, training)
        else:
            answers = _answers_of_one(_loss_called(out, column, stage), training)
        for name, _ in named:
            row, answer = rows.setdefault(table_group(name), {}), answers.get(name, "none")
            row[column] = answer if row.get(column, answer) == answer else "mixed"
    order = [name for group in GROUPS for name in (group, f"{group}, LoRA A", f"{group}, LoRA B") if name in rows]
    return {"columns": columns, "rows": [{"group": group, **rows[group]} for group in order]}


def _loss_called(out: CausalLMOutput, column: str, stage: Stage) -> Tensor:
    losses = {"LM loss": out.lm_loss, "KL": out.indexer_kl_loss}
    loss = losses[column] if column in losses else training_loss(out, stage.trains, stage.kl_coef)
    assert loss is not None
    return loss


def _answers_of_one(loss: Tensor, training: Mapping[str, nn.Parameter]) -> dict[str, Gradient]:
    grads: Iterable[Tensor | None] = [None] * len(training)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(training.values()), allow_unused=True, retain_graph=True)
    return {name: gradient_of(grad) for name, grad in zip(training, grads, strict=True)}


def _answers_of_ranks(
    model: nn.Module, column: str, stage: Stage, batch: Batch, training: Mapping[str, nn.Parameter]
) -> dict[str, Gradient]:
    """The same by a forward and a backward for the loss: gradients of shards come out of `backward` only."""
    loss = _loss_called(model(**model_inputs(model, stage, batch)), column, stage)
    if loss.requires_grad:
        loss.backward()
    with_grad = {name: parameter.grad for name, parameter in training.items() if parameter.grad is not None}
    largest = dict(zip(with_grad, largest_values(list(with_grad.values())), strict=True))
    model.zero_grad(set_to_none=True)
    return {name: kind_of(float(largest[name])) if name in largest else "none" for name in training}


def expected_gradients(groups: Iterable[str], stage: Stage) -> dict[str, JSON]:
    """The gradient table that a stage must have before its first step, for a model with these rows.

    The LM loss reaches all that trains but the indexer, the KL the indexer and nothing else. Of an adapter B alone has
    gradient while B is 0; A then has 0.
    """
    groups = list(groups)
    adapted = any(", LoRA " in group for group in groups)
    columns = ["LM loss", *(["KL"] if stage.trains != "model" else []), "what is minimised"]

    def cell(group: str, column: str) -> str:
        side = "indexer" if group.startswith("indexer") else "model"
        trains = stage.trains in ("all", side) and (not adapted or ", LoRA " in group)
        read_by = {"LM loss": ("model",), "KL": ("indexer",)}.get(column, ("model", "indexer"))
        if not trains or side not in read_by:
            return "none"
        return "zero" if group.endswith("LoRA A") else "finite"

    return {
        "columns": columns,
        "rows": [{"group": group, **{column: cell(group, column) for column in columns}} for group in groups],
    }


def model_inputs(model: nn.Module, stage: Stage, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of one training forward of a stage, on the model's device; of its own rows on several ranks."""
    device = next(model.parameters()).device
    batch = own_rows(model, batch)
    parts = {
        "input_ids": batch.input_ids_BL, "labels": batch.labels_BL, "attention_mask": batch.attention_mask_BL,
        "position_ids": batch.position_ids_BL,
    }  # fmt: skip
    tensors = {name: part.to(device) for name, part in parts.items() if part is not None}
    return {**tensors, "use_cache": False, "output_indexer_kl_loss": stage.trains != "model"}


def judge_gradients(model: nn.Module, stage: Stage, batch: Batch) -> Verdict:
    """`train.gradients`: before the first step exactly those get gradient, from exactly those losses, that should."""
    found = gradient_table(model, stage, batch)
    groups = [row["group"] for row in found["rows"]]
    expected = expected_gradients(groups, stage)
    wrong = _cells_apart(found, expected)
    measures = [Measure("cells of the gradient table that differ from the stage's", len(wrong), 0)]
    nulls = [
        NullCandidate(kind, bool(_cells_apart(planted, expected)))
        for kind, planted in (
            ("no gradient anywhere", _filled(expected, "none")),
            ("gradient everywhere", _filled(expected, "finite")),
            ("zero for none", _replaced(expected, "none", "zero")),
            ("not finite", _replaced(expected, "finite", "not finite")),
        )
        if planted != expected
    ]
    return Verdict(
        "train.gradients", "train", type(model).__name__, stage.name, status_of(measures, nulls),
        reason=wrong[0] if wrong else "", measures=tuple(measures), nulls=tuple(nulls), data={"gradient_table": found},
    )  # fmt: skip


def _cells_apart(found: Mapping[str, JSON], expected: Mapping[str, JSON]) -> list[str]:
    return [
        f"{row['group']} got gradient {row[column]!r} from {column}; it must be {should[column]!r}."
        for row, should in zip(found["rows"], expected["rows"], strict=True)
        for column in expected["columns"]
        if row[column] != should[column]
    ]


def _filled(table: Mapping[str, JSON], answer: str) -> dict[str, JSON]:
    rows = [{"group": row["group"], **dict.fromkeys(table["columns"], answer)} for row in table["rows"]]
    return {"columns": table["columns"], "rows": rows}


def _replaced(table: Mapping[str, JSON], answer: str, by: str) -> dict[str, JSON]:
    rows = [{key: by if value == answer else value for key, value in row.items()} for row in table["rows"]]
    return {"columns": table["columns"], "rows": rows}
