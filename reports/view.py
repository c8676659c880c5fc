"""What every report shows of a run, before it is laid out for a terminal or a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from reports.schema import FAILING, Measure, Measurement, Run, Status, Verdict, count_statuses
from reports.strict_json import JSON
from reports.text import number, percent

_HEADER_ROWS = (
    ("subject", "subject"),
    ("reference", "reference"),
    ("config", "config"),
    ("device asked", "device_asked"),
    ("device", "device"),
    ("dtypes", "dtypes"),
    ("backend", "backend"),
    ("implementations", "implementations"),
    ("seed", "seed"),
    ("command", "command"),
)


def what_ran_where(run: Run) -> list[tuple[str, str]]:
    """The header as rows of name and text; what the header does not hold is left out."""
    given = [(label, run.header.get(key)) for label, key in _HEADER_ROWS]
    rows = [
        (label, flat(value, " " if label == "command" else ", "))
        for label, value in given
        if value not in (None, "", {}, [])
    ]
    environment = run.header.get("environment")
    if isinstance(environment, dict):
        if "command" not in run.header and environment.get("command"):
            rows.append(("command", flat(environment["command"], " ")))
        for key in ("seeds", "versions", "os", "cpu", "gpu", "git", "started"):
            if environment.get(key):
                rows.append((key, flat(environment[key])))
    return rows


def environment_rows(run: Run) -> list[tuple[str, str]]:
    """The whole environment as rows of dotted name and text."""
    return _flatten("", run.header.get("environment"))


def _flatten(name: str, value: JSON) -> list[tuple[str, str]]:
    if not isinstance(value, dict):
        return [] if value is None else [(name, flat(value))]
    return [row for key, item in value.items() for row in _flatten(f"{name}.{key}" if name else key, item)]


def flat(value: JSON, between: str = ", ") -> str:
    """A JSON value as one text: lists joined, mappings as `name value`."""
    if isinstance(value, dict):
        return between.join(f"{key} {flat(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return between.join(flat(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def families(run: Run) -> dict[str, list[Verdict]]:
    """The verdicts by family, in the order of the record."""
    found: dict[str, list[Verdict]] = {}
    for verdict in run.verdicts:
        found.setdefault(verdict.family, []).append(verdict)
    return found


def failing(run: Run) -> list[Verdict]:
    """What failed, then what was vacuous, then what raised."""
    return [verdict for status in FAILING for verdict in run.verdicts if verdict.status is status]


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many verdicts have each status, those that occur."""
    found = count_statuses(verdict.status for verdict in verdicts)
    return " · ".join(f"{count} {status}" for status, count in found.items() if count)


def unchecked(run: Run) -> list[Verdict]:
    """What was skipped, then what was not applicable."""
    statuses = (Status.SKIPPED, Status.NOT_APPLICABLE)
    return [verdict for status in statuses for verdict in run.verdicts if verdict.status is status]


class Labels:
    """Names of cases and dtypes that say the subject and the device only where the run has several."""

    def __init__(self, run: Run) -> None:
        self._subjects = len({verdict.subject for verdict in run.verdicts}) > 1
        self._devices = len({verdict.device for verdict in run.verdicts if verdict.device}) > 1

    def case(self, verdict: Verdict) -> str:
        """The case, with the subject in front where needed."""
        return f"{verdict.subject}: {verdict.case}" if self._subjects else verdict.case

    def dtype(self, verdict: Verdict) -> str:
        """The dtype, with the device behind where needed."""
        return f"{verdict.dtype} {verdict.device}".strip() if self._devices else verdict.dtype

    def full(self, verdict: Verdict) -> str:
        """Check, dtype and case in one text."""
        dtype = self.dtype(verdict)
        case = self.case(verdict)
        return verdict.check + (f" ({dtype})" if dtype else "") + (f" on {case}" if case else "")


def worst(verdict: Verdict) -> Measure | None:
    """The measure that takes the largest share of its budget; the first one where no budget is given."""

    def rank(measure: Measure) -> float:
        if measure.used is None:
            return -math.inf
        return math.inf if math.isnan(measure.used) else measure.used

    return max(verdict.measures, key=rank, default=None)


def measured(measure: Measure | None) -> str:
    """A measure as `name value / budget`."""
    if measure is None:
        return ""
    budget = "" if measure.budget is None else f" / {number(measure.budget)}"
    return f"{measure.name} {number(measure.value)}{budget} {measure.unit}".rstrip()


def used(measure: Measure | None) -> str:
    """The share of its budget that a measure takes."""
    return "" if measure is None or measure.used is None else percent(measure.used)


def failure_details(verdict: Verdict) -> list[str]:
    """Why a verdict needs reading, a line each: reason, measures, null candidates, traceback."""
    lines = [verdict.reason] if verdict.reason else []
    lines += [f"beyond its budget: {measured(measure)}" for measure in verdict.measures if not measure.within]
    lines += [
        f"accepted the null candidate {null.kind}" + (f": {null.detail}" if null.detail else "")
        for null in verdict.nulls
        if not null.rejected
    ]
    traceback = verdict.data.get("traceback")
    if isinstance(traceback, str):
        lines += traceback.rstrip().split("\n")[-8:]
    return lines


def nulls_of_checks(run: Run) -> dict[str, dict[str, bool]]:
    """For each check its kinds of null candidates, and whether each was rejected every time."""
    found: dict[str, dict[str, bool]] = {}
    for verdict in run.verdicts:
        for null in verdict.nulls:
            kinds = found.setdefault(verdict.check, {})
            kinds[null.kind] = kinds.get(null.kind, True) and null.rejected
    return found


def curves(verdict: Verdict) -> dict[str, list[float]]:
    """The curves in a verdict's data; what is not a list of numbers is left out."""
    data = verdict.data.get("curves")
    if not isinstance(data, dict):
        return {}
    found = {}
    for name, values in data.items():
        if isinstance(values, list):
            points = [float(value) for value in values if isinstance(value, (int, float))]
            if points and len(points) == len(values):
                found[name] = points
    return found


def gradient_table(verdict: Verdict) -> tuple[list[str], list[list[str]]] | None:
    """Column names and rows of the table of who gets gradient, group first; None without one."""
    data = verdict.data.get("gradient_table")
    if not isinstance(data, dict):
        return None
    columns, rows = data.get("columns"), data.get("rows")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return None
    names = ["group", *(str(column) for column in columns if column != "group")]
    return names, [[flat(row.get(name, "")) for name in names] for row in rows if isinstance(row, dict)]


def measurement_cells(measurement: Measurement) -> list[str]:
    """Name, subject, case, number of samples, median, and range of a measurement."""
    samples, unit = measurement.samples, measurement.unit
    middle = number(median(samples), unit) if samples else ""
    span = f"{number(min(samples))} to {number(max(samples), unit)}" if samples else ""
    return [measurement.name, measurement.subject, measurement.case, str(len(samples)), middle, span]
