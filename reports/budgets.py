"""How much of its budget each check takes: the worst over its cases, by subject and dtype."""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import FAILING, Measure, Run, Status, Verdict
from reports.view import Labels, worst


@dataclass(frozen=True, slots=True)
class CheckUse:
    """One check of one subject in one dtype: its verdicts, and the measure that takes the largest share of a budget."""

    family: str
    check: str
    subject: str
    dtype: str
    verdicts: tuple[Verdict, ...]

    @property
    def worst(self) -> tuple[Verdict, Measure] | None:
        """The worst measure and its verdict; None where no measure has a budget."""
        found = [(v, m) for v in self.verdicts if (m := worst(v)) is not None and m.used is not None]
        return max(found, key=lambda pair: _rank(pair[1]), default=None)

    @property
    def status(self) -> Status:
        """What needs reading most: a failing status before verified, verified before what was not checked."""
        found = {verdict.status for verdict in self.verdicts}
        return next(status for status in (*FAILING, *Status) if status in found)


def check_uses(run: Run) -> list[CheckUse]:
    """Every check by subject and dtype, in the order of the record."""
    labels = Labels(run)
    found: dict[tuple[str, str, str, str], list[Verdict]] = {}
    for verdict in run.verdicts:
        key = (verdict.family, verdict.check, verdict.subject, labels.dtype(verdict))
        found.setdefault(key, []).append(verdict)
    return [CheckUse(*key, tuple(verdicts)) for key, verdicts in found.items()]


def _rank(measure: Measure) -> float:
    assert measure.used is not None
    return float("inf") if measure.used != measure.used else measure.used
