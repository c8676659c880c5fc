"""A run as one page of HTML that opens without a network: the verdict, then what failed, then everything else."""

from __future__ import annotations

from reports import html_measured, html_verdicts
from reports.page import Folded, Page, Section, Table, page
from reports.records import Run, run_exit_code, verdict_line, why_not_complete
from reports.shards import COLUMNS, shards
from reports.view import environment_rows, what_ran_where

_WORDS = {
    0: "Verified", 1: "Failed", 3: "Not verified", 4: "Slower or less accurate", 130: "Interrupted",
}  # fmt: skip
# What a page shows, in the order in which a reader asks; each is left out where the record holds nothing of it.
_SECTIONS = (
    html_verdicts.failures,
    lambda run: _ran(run),
    lambda run: _shards(run),
    html_verdicts.budgets,
    html_verdicts.stages,
    html_verdicts.selection,
    html_measured.planned,
    html_measured.training_charts,
    html_measured.proof,
    html_measured.curve_charts,
    html_measured.kill_matrix,
    html_measured.time_and_memory,
    html_measured.guide,
    html_verdicts.gradients,
    html_measured.measurements,
    html_verdicts.not_checked,
    html_verdicts.nulls,
    html_verdicts.verdicts,
    lambda run: _environment(run),
)


def html(run: Run) -> str:
    """The page of a run; long tables are cut, and say so, until it is small enough to be sent around."""
    stopped = why_not_complete(run)
    code = run_exit_code(run)
    seen = len(run.verdicts) + len(run.measurements) + len(run.events)
    return page(
        Page(
            kicker=_kicker(run),
            word="Did not end" if stopped and code == 3 else _WORDS.get(code, f"Exit code {code}"),
            good=code == 0,
            line=verdict_line(run),
            sections=[found for make in _SECTIONS if (found := make(run)) is not None],
            command="v32 report",
            warning=f"{stopped}. The record holds {seen} lines after its header." if stopped else "",
        )
    )


def _kicker(run: Run) -> str:
    command = run.header.get("command")
    words = command.split() if isinstance(command, str) else command if isinstance(command, list) else []
    parts = [" ".join(map(str, words[:2])), *(run.header.get(key) for key in ("subject", "config", "device"))]
    return " · ".join(part for part in parts if isinstance(part, str) and part)


def _ran(run: Run) -> Section | None:
    rows = [list(row) for row in what_ran_where(run) if row[1]]
    return Section("ran", "What ran where", [Table("The run", ("what", "value"), rows)]) if rows else None


def _shards(run: Run) -> Section | None:
    found = shards(run)
    table = None if found is None else Table("Each shard, and its last attempt's time", COLUMNS, found.cells())
    return None if table is None else Section("shards", "Shards", [table])


def _environment(run: Run) -> Section | None:
    rows = [list(row) for row in environment_rows(run)]
    table = Table("Environment", ("name", "value"), rows)
    return Section("environment", "Environment", [Folded(f"{len(rows)} entries", table)]) if rows else None
