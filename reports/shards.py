"""How each shard of a run that was cut into several commands went: on which GPU, how often tried, for how long, at what cost.

An event "shard" holds: "shard", "gpu_asked" and "gpu" (lists of names, the ones asked for from the most wanted on),
"attempts", "seconds" (of the last attempt), "cost" (US$, null where it is not known), "exit_code", and "problem", a
sentence where the shard did not do its work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.schema import Event, Run
from reports.strict_json import JSON
from reports.text import duration
from reports.view import flat

EVENT = "shard"
COLUMNS = ("shard", "GPU asked for", "GPU received", "attempts", "time", "cost, US$", "ended", "what went wrong")
# Those that a narrow terminal leaves out: it names what went wrong below, as an error.
DETAILS = (1, 7)
_MOST = 1e12
# What the exit codes of a command that did its work say.
_ENDS = {0: "done", 1: "a check failed", 3: "an error, or nothing verified", 4: "slower or less accurate"}


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One shard; None for a number that the record does not hold."""

    name: str
    gpu_asked: tuple[str, ...]
    gpu: tuple[str, ...]
    attempts: int | None
    seconds: float | None
    cost: float | None
    exit_code: int | None
    problem: str

    @property
    def ended(self) -> str:
        """How it ended, in a few words."""
        if self.problem:
            return "did not do its work"
        return _ENDS.get(self.exit_code, f"exit code {self.exit_code}") if self.exit_code is not None else "not known"


@dataclass(frozen=True, slots=True)
class Shards:
    """All shards that ended, in the order of the run. `cost` is None where none has one."""

    rows: tuple[ShardRow, ...]

    @property
    def seconds(self) -> float:
        """Of all shards together, which ran beside one another."""
        return sum(row.seconds or 0.0 for row in self.rows)

    @property
    def cost(self) -> float | None:
        """US$ of all shards whose cost is known; None where no price was given."""
        known = [row.cost for row in self.rows if row.cost is not None]
        return sum(known) if known else None

    def cells(self) -> list[list[str]]:
        """The rows of `COLUMNS`, and their total."""
        rows = [
            [row.name, _names(row.gpu_asked), _names(row.gpu), "-" if row.attempts is None else str(row.attempts),
             "-" if row.seconds is None else duration(row.seconds), _dollars(row.cost), row.ended, row.problem]
            for row in self.rows
        ]  # fmt: skip
        return [*rows, ["total", "", "", "-", duration(self.seconds), _dollars(self.cost), "", ""]]


def shards(run: Run) -> Shards | None:
    """The shards of a run, None where it was not cut into any."""
    rows = tuple(_row(event) for event in run.events if event.kind == EVENT)
    return Shards(rows) if rows else None


def _row(event: Event) -> ShardRow:
    data = event.data
    attempts, code = _number(data.get("attempts")), _number(data.get("exit_code"))
    return ShardRow(
        name=flat(data.get("shard")),
        gpu_asked=_texts(data.get("gpu_asked")),
        gpu=_texts(data.get("gpu")),
        attempts=None if attempts is None else int(attempts),
        seconds=_number(data.get("seconds")),
        cost=_number(data.get("cost")),
        exit_code=None if code is None else int(code),
        problem=flat(data.get("problem") or ""),
    )


def _number(value: JSON) -> float | None:
    # A record may have been written by anyone: NaN and what no run lasts or costs are no numbers of it.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST
    return float(value) if is_number else None


def _texts(value: JSON) -> tuple[str, ...]:
    return tuple(flat(item) for item in value) if isinstance(value, list) else ()


def _names(given: Sequence[str]) -> str:
    return ", ".join(given) or "none"


def _dollars(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.2f}"
