"""The kill matrix of a run: which check notices which known bug, and which check no bug needs.

A verdict takes part by `data["mutant"]`: {"entry", "what", "source", "killed_by": [names of checks]}. The header
holds "checks", the names of all checks that ran, and "catalogue", a list of {"entry", "mutants", "reason"}.
"""

from __future__ import annotations

from dataclasses import dataclass

from reports.schema import Run
from reports.strict_json import JSON

FAMILY, ALARMS = "mutants", "false_alarms"
KILLED, MISSED = "●", "·"


@dataclass(frozen=True, slots=True)
class MutantRow:
    """One known bug, where it is on record, and the checks that failed it."""

    name: str
    entry: str
    what: str
    source: str
    killed_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One check: how many mutants it fails, and which of them no other check fails."""

    number: int
    name: str
    kills: int
    alone: tuple[str, ...]

    @property
    def redundant(self) -> bool:
        """Whether every mutant that it fails is failed by another check too."""
        return not self.alone


@dataclass(frozen=True, slots=True)
class Kills:
    """The matrix."""

    mutants: tuple[MutantRow, ...]
    checks: tuple[CheckRow, ...]
    # The other number: verdicts against right subjects, of how many, on how many seeds. None where it was not asked for.
    alarms: tuple[int, int, int] | None = None

    @property
    def alarm_line(self) -> str:
        """What is known of false alarms, in a sentence."""
        if self.alarms is None:
            return "False alarms on right subjects were not counted."
        count, verdicts, seeds = self.alarms
        return f"False alarms on right subjects: {count} of {verdicts:,} verdicts, {seeds} seeds."

    @property
    def survivors(self) -> tuple[str, ...]:
        """Mutants that no check failed."""
        return tuple(row.name for row in self.mutants if not row.killed_by)

    def lines(self) -> list[str]:
        """The matrix as text of one width: a row a mutant, a numbered column a check."""
        width = max(len(row.name) for row in self.mutants)
        head = " ".join(f"{check.number:>2}" for check in self.checks)
        rows = [f"{'':{width}}  {head}"]
        for row in self.mutants:
            signs = " ".join(f" {KILLED if check.name in row.killed_by else MISSED}" for check in self.checks)
            rows.append(f"{row.name:{width}}  {signs}")
        return rows

    def check_cells(self) -> list[list[str]]:
        """For each check its number, name, kills, and the mutants that it alone kills, or that it is redundant."""
        return [
            [str(row.number), row.name, str(row.kills), ", ".join(row.alone) if row.alone else "redundant here"]
            for row in self.checks
        ]

    def mutant_cells(self) -> list[list[str]]:
        """For each mutant its name, what is wrong, where it is on record, and how many checks fail it."""
        return [[row.name, row.what, row.source, str(len(row.killed_by))] for row in self.mutants]


def kills(run: Run) -> Kills | None:
    """The kill matrix of `run`; None for a run without mutants."""
    mutants = []
    for verdict in run.verdicts:
        found = verdict.data.get("mutant")
        if isinstance(found, dict):
            killers = found.get("killed_by")
            names = tuple(map(str, killers)) if isinstance(killers, list) else ()
            entry, what, source = (str(found.get(key, "")) for key in ("entry", "what", "source"))
            mutants.append(MutantRow(verdict.check.removeprefix(f"{FAMILY}."), entry, what, source, names))
    if not mutants:
        return None
    given = run.header.get("checks")
    checks = [str(name) for name in given] if isinstance(given, list) else []
    checks += sorted({name for row in mutants for name in row.killed_by} - set(checks))
    rows = tuple(
        CheckRow(
            number,
            name,
            sum(name in row.killed_by for row in mutants),
            tuple(row.name for row in mutants if row.killed_by == (name,)),
        )
        for number, name in enumerate(checks, 1)
    )
    return Kills(tuple(mutants), rows, _alarms(run))


def _alarms(run: Run) -> tuple[int, int, int] | None:
    found = [
        {measure.name: measure.value for measure in verdict.measures}
        for verdict in run.verdicts
        if verdict.check == f"{FAMILY}.{ALARMS}"
    ]
    if not found:
        return None
    count, verdicts, seeds = (
        int(sum(values.get(name, 0) for values in found)) for name in ("false alarms", "verdicts", "seeds")
    )
    return count, verdicts, seeds


def catalogue_cells(run: Run) -> list[list[str]]:
    """For each entry of the catalogue of public bugs its mutants, or the sentence that says why there is none."""
    given = run.header.get("catalogue")
    if not isinstance(given, list):
        return []
    return [_entry(item) for item in given if isinstance(item, dict)]


def _entry(item: dict[str, JSON]) -> list[str]:
    names = item.get("mutants")
    shown = ", ".join(map(str, names)) if isinstance(names, list) and names else str(item.get("reason", ""))
    return [str(item.get("entry", "")), shown]
