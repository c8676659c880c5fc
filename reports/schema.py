"""What a record file holds: verdicts, measurements and events, the closed set of statuses, the exit codes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from reports.strict_json import JSON

SCHEMA_VERSION = 1
RUN_FILE = "run.jsonl"


class RecordError(ValueError):
    """A file that is not a record of a run, or a record that contradicts itself; one sentence."""


class Status(StrEnum):
    """What a check may answer, in the order in which statuses are counted."""

    VERIFIED = "verified"
    FAILED = "failed"
    VACUOUS = "vacuous"
    ERROR = "error"
    SKIPPED = "skipped"
    NOT_APPLICABLE = "not-applicable"


FAILING = (Status.FAILED, Status.VACUOUS, Status.ERROR)


@dataclass(frozen=True, slots=True)
class Measure:
    """A number with the largest value allowed for it; without a budget it is only reported."""

    name: str
    value: float
    budget: float | None = None
    unit: str = ""

    @property
    def used(self) -> float | None:
        """The share of the budget that the value takes, None without a budget."""
        if self.budget is None:
            return None
        if self.budget == 0:
            return 0.0 if self.value == 0 else self.value * math.inf
        return self.value / self.budget

    @property
    def within(self) -> bool:
        """Whether the value is at most its budget; NaN never is."""
        return not math.isnan(self.value) and (self.budget is None or self.value <= self.budget)


@dataclass(frozen=True, slots=True)
class NullCandidate:
    """A wrong answer that the check was given, and whether the check rejected it."""

    kind: str
    rejected: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer of one check on one case.

    `data` holds what a report shows besides: "curves" {name: [floats]}, "gradient_table" {"columns": [names],
    "rows": [{"group": name, column: "none" | "zero" | "finite"}]}, "traceback".
    A verdict that says `verified` over a measure beyond its budget or an accepted null candidate is refused.
    """

    check: str
    family: str
    subject: str
    case: str
    status: Status
    dtype: str = ""
    device: str = ""
    reason: str = ""
    measures: tuple[Measure, ...] = ()
    nulls: tuple[NullCandidate, ...] = ()
    seconds: float = 0.0
    reproduce: str = ""
    data: dict[str, JSON] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.status is not Status.VERIFIED:
            return
        for measure in self.measures:
            if measure.budget is not None and not measure.within:
                raise RecordError(
                    f"status of {self.check} is verified, but measure {measure.name} is {measure.value} "
                    f"on a budget of {measure.budget}; allowed are measures within their budgets."
                )
        for null in self.nulls:
            if not null.rejected:
                raise RecordError(
                    f"status of {self.check} is verified, but it accepted the null candidate {null.kind}; "
                    "allowed are rejected null candidates."
                )


@dataclass(frozen=True, slots=True)
class Measurement:
    """Raw samples of one quantity, such as the times of one operator at one length."""

    name: str
    subject: str
    case: str
    samples: tuple[float, ...]
    unit: str = ""
    data: dict[str, JSON] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened `at` seconds after the start and is not a result."""

    kind: str
    at: float
    data: dict[str, JSON] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Run:
    """A record file, read. `problem` says where a cut or damaged line is; `footer` is None without an end."""

    header: dict[str, JSON]
    verdicts: tuple[Verdict, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    events: tuple[Event, ...] = ()
    footer: dict[str, JSON] | None = None
    problem: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the run went to its end and every line of it could be read."""
        return self.problem is None and self.footer is not None and self.footer.get("ended") == "complete"


def count_statuses(statuses: Iterable[Status]) -> dict[Status, int]:
    """How often each status occurs, all of them, in the order of `Status`."""
    found = dict.fromkeys(Status, 0)
    for status in statuses:
        found[status] += 1
    return found


def exit_code(statuses: Iterable[Status], usage_error: bool = False) -> int:
    """2 wrong usage, 1 any failed or vacuous, 3 any error or nothing verified, else 0."""
    found = count_statuses(statuses)
    if usage_error:
        return 2
    if found[Status.FAILED] or found[Status.VACUOUS]:
        return 1
    return 3 if found[Status.ERROR] or not found[Status.VERIFIED] else 0
