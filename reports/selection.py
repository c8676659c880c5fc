"""Selection by layer: how wide the margin is within which keys may differ, and how many do.

A verdict of `choices.keys` takes part by `data["layers"]`: [{"layer", "wrong", "flips", "margin"}].
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import Run, Verdict
from reports.text import number

COLUMNS = ("case", "dtype", "layer", "wrong keys", "flips within the margin", "margin")
OTHER_COLUMNS = ("check", "case", "dtype", "what", "found", "allowed")


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """One layer of one verdict; counts are of keys, the margin is of the score."""

    case: str
    dtype: str
    layer: int
    wrong: float
    flips: float
    margin: float

    def cells(self) -> list[str]:
        """A row of `COLUMNS`."""
        counts = (number(self.wrong), number(self.flips), number(self.margin))
        return [self.case, self.dtype, str(self.layer), *counts]


def selections(run: Run) -> list[LayerSelection]:
    """What `choices.keys` recorded of each layer, in the order of the record."""
    return [entry for verdict in run.verdicts if verdict.check == "choices.keys" for entry in _layers(verdict)]


def other_choices(run: Run) -> list[list[str]]:
    """What the other checks of choices counted: experts, the first layer in bf16, free runs."""
    return [
        [verdict.check, verdict.case, verdict.dtype, measure.name, number(measure.value, measure.unit),
         "" if measure.budget is None else number(measure.budget)]
        for verdict in run.verdicts
        if verdict.family == "choices" and verdict.check != "choices.keys"
        for measure in verdict.measures
    ]  # fmt: skip


def _layers(verdict: Verdict) -> list[LayerSelection]:
    found = []
    given = verdict.data.get("layers")
    for item in given if isinstance(given, list) else ():
        if not isinstance(item, dict) or not isinstance(item.get("layer"), int):
            continue
        numbers = [
            float(value) for key in ("wrong", "flips", "margin") if isinstance(value := item.get(key), (int, float))
        ]
        if len(numbers) == 3:
            found.append(LayerSelection(verdict.case, verdict.dtype, item["layer"], *numbers))
    return found
