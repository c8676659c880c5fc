"""The table of proof of a training recipe: what a warmed-up indexer is worth, and which faults its numbers notice.

A run takes part by "recipe" in its header: {"index_topk": k, "seeds": [...]}. Its rows are measurements, a sample a seed:
`name` is the column, `subject` whose code it was ("recipe", a fault), `case` "STAGE, SELECTION". Those of subject "fault"
say what a fault, their `case`, does to a number that has a target; `data` holds "target" and "noticed".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from reports.plan import plan
from reports.schema import Measurement, Run
from reports.text import number
from reports.training import Tables, training

FAULT, TIME = "fault", "CPU time"
RECIPE = "recipe"
# Stage → title of its table.
STAGES = {"warmup": "after the warm-up", "sparse": "after the sparse stage"}
_LAYER = re.compile(r"(.+), layer \d+")
# The order of the columns, by how they begin: a row without an indexer has no KL.
_ORDER = ("KL", "captured", "recall", "left out", "loss, text", "accuracy, text", "loss", "accuracy")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run of `v32 recipe` recorded."""

    measurements: tuple[Measurement, ...]
    seeds: int

    def tables(self) -> Tables:
        """Titles, column names and cells."""
        rows = [m for m in self.measurements if m.subject != FAULT and m.name != TIME]
        found: Tables = []
        for stage, title in STAGES.items():
            own = [m for m in rows if m.case.startswith(f"{stage}, ")]
            right = [m for m in own if m.subject == RECIPE or m.case.endswith(", dense")]
            if right:
                found.append((f"{title}, by selection", *_table(right, _selection)))
            wrong = [m for m in own if m not in right]
            if wrong:
                found.append((f"{title} with a fault", *_table(wrong, lambda m: m.subject)))
        noticed = [m for m in self.measurements if m.subject == FAULT]
        if noticed:
            found.append(("which numbers notice a fault", *_noticed(noticed)))
        times = [m for m in self.measurements if m.name == TIME]
        if times:
            cells = [[m.subject, f"{mean(m.samples):.0f} s"] for m in times]
            found.append(("CPU time of training", ["stage", "mean over seeds"], cells))
        return found

    def notes(self) -> list[str]:
        """What the columns are, in sentences."""
        return [
            f"Means over {self.seeds} seeds. KL and captured of each layer, first to last, on every visible key; captured is "
            "1 − KL / KL of a uniform predictor. recall is the attention mass that the selected keys hold, over the most "
            "that as many keys can hold. Losses are in nats a scored token, accuracies are of the answers.",
            "best selects by the true attention mass; recent, the last keys; untrained, by a fresh indexer. A fault is "
            "noticed by a number that misses its target in every seed.",
        ]


def recipe(run: Run) -> Recipe | None:
    """The table of a run, or None when it is another kind of run or has no row yet."""
    header = run.header.get("recipe")
    if not isinstance(header, dict) or not run.measurements:
        return None
    seeds = header.get("seeds")
    return Recipe(run.measurements, len(seeds) if isinstance(seeds, list) else 0)


def sections(run: Run, most: int) -> list[tuple[Tables, list[str]]]:
    """Tables and notes of what a run plans or trained: its curves at no more than `most` steps, its table of proof."""
    planned, curves, proof = plan(run), training(run), recipe(run)
    found = [] if planned is None else [(planned.tables(most), planned.notes())]
    found += [] if curves is None else [(curves.tables(most), curves.notes())]
    return found + ([] if proof is None else [(proof.tables(), proof.notes())])


def _selection(measurement: Measurement) -> str:
    selection = measurement.case.split(", ", 1)[1]
    return selection if measurement.subject == RECIPE else measurement.subject


def _table(measured: list[Measurement], name_of: Callable[[Measurement], str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows; the layers of a quantity share a cell."""
    columns: list[str] = []
    cells: dict[str, dict[str, list[str]]] = {}
    for m in measured:
        layered = _LAYER.fullmatch(m.name)
        column = layered[1] if layered else m.name
        if column not in columns:
            columns.append(column)
        cells.setdefault(name_of(m), {}).setdefault(column, []).append(_shown(column, mean(m.samples)))
    columns.sort(key=lambda column: next(i for i, start in enumerate(_ORDER) if column.startswith(start)))
    rows = [[name, *(" · ".join(row.get(column, ["-"])) for column in columns)] for name, row in cells.items()]
    return ["", *columns], rows


def _shown(column: str, value: float) -> str:
    # z: a mass of -1e-8, which rounding leaves, is 0.0 %.
    return f"{value:z.1%}" if column.startswith(("accuracy", "recall", "left out")) else f"{value:.3g}"


def _noticed(measured: list[Measurement]) -> tuple[list[str], list[list[str]]]:
    columns = list(dict.fromkeys(m.name for m in measured))
    rows: dict[str, dict[str, str]] = {}
    for m in measured:
        word = "noticed" if m.data.get("noticed") else "not noticed"
        rows.setdefault(m.case, {})[m.name] = f"{number(mean(m.samples))}, {word}"
    return ["fault", *columns], [[name, *(row.get(column, "-") for column in columns)] for name, row in rows.items()]
