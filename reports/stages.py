"""Where two models part: errors by layer and stage of the forward, as shares of their budgets.

A verdict takes part by `data["stages"]`: [{"layer": 0 … or null, "stage": one of `STAGES`, "error", "budget"}], measured on
the replayed states, so that an error shows where it arises. Without that, what other checks say of a stage is used:
`choices.keys` of the selection of each layer, the checks of operators and of the losses of a stage as a whole, and the
parameters whose gradients are worst of the layers that they belong to.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from reports.schema import Run, Verdict
from reports.strict_json import JSON
from reports.view import worst

STAGES = ("projection", "RoPE", "index scores", "selection", "attention", "MoE", "loss")
COLUMNS = ("stage", "layer", "dtype", "case", "share of budget", "measured by")
# What a check or an operator says of a whole stage, by the start of its name.
_OF_CHECK = {
    "operators.index_scores": "index scores", "operators.indexer_topk": "selection",
    "operators.sparse_mla": "attention", "operators.dense_mla": "attention", "operators.indexer_kl": "loss",
    "parity.logits": "loss", "parity.lm_loss": "loss", "kl.loss": "loss", "choices.experts": "MoE",
}  # fmt: skip
_OF_PARAMETER = (
    (r"\.indexer\.", "index scores"), (r"\.o_proj\.", "attention"), (r"\.self_attn\.|input_layernorm", "projection"),
    (r"\.mlp\.|post_attention_layernorm", "MoE"), ("", "loss"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StageError:
    """One error: `used` is its share of the budget, `layer` None for a stage as a whole."""

    stage: str
    layer: int | None
    dtype: str
    case: str
    used: float
    source: str

    @property
    def order(self) -> tuple[int, int]:
        """The place in a forward; what belongs to no layer comes at the end."""
        return (self.layer if self.layer is not None else 10**6, STAGES.index(self.stage))


def stage_errors(run: Run) -> list[StageError]:
    """Every error of the run that can be placed, in the order of a forward."""
    found = [error for verdict in run.verdicts for error in _of_verdict(verdict)]
    return sorted(found, key=lambda error: error.order)


def gradient_errors(run: Run) -> list[StageError]:
    """The worst gradients of each verdict by the layer and stage of their parameter, the worst first."""
    found = []
    for verdict in run.verdicts:
        given = verdict.data.get("worst_parameters")
        for name, used in given.items() if isinstance(given, dict) else ():
            if isinstance(used, (int, float)):
                stage = next(stage for pattern, stage in _OF_PARAMETER if re.search(pattern, name))
                layer = re.search(r"\blayers\.(\d+)\.", name)
                place = int(layer[1]) if layer else None
                source = f"{verdict.check}, {name.removeprefix('model.')}"
                found.append(StageError(stage, place, verdict.dtype, verdict.case, float(used), source))
    return sorted(found, key=lambda error: -error.used)


def first_beyond(errors: list[StageError]) -> StageError | None:
    """The first error of a forward that is beyond its budget: that of the earliest layer, else of a whole stage."""
    return next((error for error in errors if not error.used <= 1), None)


def cells(error: StageError, shown: str) -> list[str]:
    """An error as a row of `COLUMNS`; `shown` is its share in words."""
    layer = "" if error.layer is None else str(error.layer)
    return [error.stage, layer, error.dtype, error.case, shown, error.source]


def _of_verdict(verdict: Verdict) -> list[StageError]:
    found = [
        _error(verdict, item["stage"], item["layer"], _share(item["error"], item["budget"]))
        for item in _items(verdict, "stages")
        if item.get("stage") in STAGES and all(_is_number(item.get(key)) for key in ("error", "budget"))
        and isinstance(item.get("layer", ""), int | None)
    ]  # fmt: skip
    if verdict.check == "choices.keys":
        found += [
            _error(verdict, "selection", item["layer"], 0.0 if item["wrong"] == 0 else math.inf)
            for item in _items(verdict, "layers")
            if isinstance(item.get("layer"), int) and _is_number(item.get("wrong"))
        ]
    stage = next((stage for start, stage in _OF_CHECK.items() if verdict.check.startswith(start)), None)
    measure = worst(verdict)
    if stage is not None and measure is not None and measure.used is not None and "gradient" not in verdict.check:
        found.append(_error(verdict, stage, None, measure.used))
    return found


def _error(verdict: Verdict, stage: str, layer: int | None, used: float) -> StageError:
    return StageError(stage, layer, verdict.dtype, verdict.case, used, verdict.check)


def _share(error: float, budget: float) -> float:
    if budget == 0:
        return 0.0 if error == 0 else math.inf
    return error / budget


def _is_number(value: JSON) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _items(verdict: Verdict, key: str) -> list[dict[str, JSON]]:
    found = verdict.data.get(key)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
