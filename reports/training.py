"""The curves of a run of `v32 train`, who trained, and what moved.

A step takes part by an event "step": {"step": counted from 0, and any of the keys of `CURVES`, "gradient_norms":
{group: norm}}. The header holds "training": {"stage", "steps": of the whole stage, "parameters": {group: [all, that
train]}}. The verdict "train.audit" holds "audit": {"columns", "rows": [{"group", column: text}]}. Events called
"started" hold {"step": steps done before}, one for each process that worked on the run, those called "note" {"text"}.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import Run
from reports.strict_json import JSON
from reports.text import number, sparkline, spread

STEP, STARTED, NOTE = "step", "started", "note"
# In the order in which a reader asks: is it learning, what does the indexer select, what does it cost.
CURVES = {
    "lm_loss": "LM loss", "kl_loss": "KL", "uniform_kl": "KL of uniform", "captured": "captured", "recall": "recall",
    "left_out": "mass left out", "same": "same keys", "collapse": "collapse", "tokens_per_second": "tokens/s",
    "rows measured": "rows measured", "rss_mib": "memory, MiB",
}  # fmt: skip
PARAMETER_COLUMNS = ("group", "parameters", "train")

Tables = list[tuple[str, list[str], list[list[str]]]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity by step; not every step has every quantity."""

    name: str
    values: dict[int, float]


@dataclass(frozen=True, slots=True)
class Training:
    """What a run of `v32 train` recorded, as far as it came."""

    stage: str
    total: int
    parameters: dict[str, JSON]
    curves: tuple[Curve, ...]
    started: tuple[int, ...]
    audit: dict[str, JSON]
    said: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What the curves are, and what the run said of itself, in sentences."""
        found = [
            *self.said,
            "LM loss in nats a token, KL in nats a row, summed over layers; gradients are 2-norms before clipping.",
        ]
        if any(curve.name == CURVES["captured"] for curve in self.curves):
            found.append(
                "captured is 1 − KL / KL of uniform: 0 tells nothing, 1 is the attention itself. recall is the attention "
                "mass that the selection holds, over the most that as many keys can hold. collapse is how far all rows "
                "select the same keys where attention does not."
            )
        return found

    def tables(self, most: int) -> Tables:
        """Titles, column names and cells: curves at no more than `most` steps, parameters, what moved."""
        steps = self._steps(most)
        rows = [
            [curve.name, sparkline(list(curve.values.values())),
             *(number(curve.values[step]) if step in curve.values else "-" for step in steps)]
            for curve in self.curves
        ]  # fmt: skip
        found: Tables = []
        if rows:
            found.append((self._title(), ["curve", "", *(f"step {step}" for step in steps)], rows))
        if self.parameters:
            counts = [[group, *(f"{count:,}" for count in pair)] for group, pair in self._counts()]
            sums = [f"{sum(column):,}" for column in zip(*(pair for _, pair in self._counts()), strict=True)]
            found.append(("parameters", list(PARAMETER_COLUMNS), [*counts, ["all", *sums]]))
        columns, audit_rows = self.audit.get("columns"), self.audit.get("rows")
        if isinstance(columns, list) and isinstance(audit_rows, list):
            names = ["group", *(str(column) for column in columns)]
            cells = [[str(row.get(name, "")) for name in names] for row in audit_rows if isinstance(row, dict)]
            found.append(("tensors that moved", names, cells))
        return found

    def _title(self) -> str:
        done = 1 + max(step for curve in self.curves for step in curve.values)
        later = [str(step) for step in self.started if step]
        resumed = f", resumed after {', '.join(later)}" if later else ""
        return f"training, stage {self.stage}: {done} of {self.total} steps{resumed}"

    def _steps(self, most: int) -> list[int]:
        """Steps at which the rarest curve has a value, so that a column shows all of them."""
        rarest = min((list(curve.values) for curve in self.curves), key=len, default=[])
        return [rarest[i] for i in spread(len(rarest), most)]

    def _counts(self) -> list[tuple[str, list[int]]]:
        return [
            (group, [int(count) for count in pair])
            for group, pair in self.parameters.items()
            if isinstance(pair, list) and len(pair) == 2
        ]


def training(run: Run) -> Training | None:
    """The training that `run` recorded; None for a run of another kind."""
    about = run.header.get("training")
    if not isinstance(about, dict):
        return None
    values: dict[str, dict[int, float]] = {}
    for event in run.events:
        step = event.data.get("step")
        if event.kind != STEP or not isinstance(step, int):
            continue
        norms = event.data.get("gradient_norms")
        rows = {label: event.data.get(key) for key, label in CURVES.items()}
        rows |= {f"gradient, {group}": norm for group, norm in (norms if isinstance(norms, dict) else {}).items()}
        for name, value in rows.items():
            if isinstance(value, (int, float)):
                values.setdefault(name, {})[step] = float(value)
    # What one step lacked and another had comes where the first step with it stands; the table has one order.
    order = [name for name in CURVES.values() if name in values]
    order += [name for name in values if name not in order]
    audits = [verdict.data.get("audit") for verdict in run.verdicts if verdict.check == "train.audit"]
    total, parameters = about.get("steps"), about.get("parameters")
    return Training(
        stage=str(about.get("stage", "")),
        total=total if isinstance(total, int) else 0,
        parameters=parameters if isinstance(parameters, dict) else {},
        curves=tuple(Curve(name, values[name]) for name in order),
        started=tuple(int(event.data.get("step", 0)) for event in run.events if event.kind == STARTED),
        said=tuple(str(event.data["text"]) for event in run.events if event.kind == NOTE and "text" in event.data),
        audit=next((audit for audit in audits if isinstance(audit, dict)), {}),
    )
