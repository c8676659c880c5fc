"""A run as Markdown that fits a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reports.kills import FAMILY, catalogue_cells, kills
from reports.recipe import sections
from reports.records import Run, Verdict, verdict_line, why_not_complete
from reports.shards import COLUMNS as SHARD_COLUMNS
from reports.shards import shards
from reports.text import clean, duration, heading, number, one_line, sparkline, spread
from reports.timings import COLUMNS, FLOOR_COLUMNS, GROWTH_COLUMNS, point_of, timings
from reports.timings import FAMILY as BENCH
from reports.view import (
    Labels,
    curves,
    environment_rows,
    failing,
    failure_details,
    families,
    gradient_table,
    measured,
    measurement_cells,
    nulls_of_checks,
    tally,
    unchecked,
    used,
    what_ran_where,
    worst,
)

# A comment on a pull request may hold 65,536 characters.
_FITS = 60_000
_LONGEST_TEXT = 1500
# Steps of a training curve that a table shows.
_STEPS = 7


def markdown(run: Run) -> str:
    """The report of a run; long tables are cut, and say so, until it fits a comment."""
    for rows in (1000, 100, 30, 10, 3):
        text = _page(run, rows)
        if len(text) <= _FITS:
            return text
    return text


def escape(text: str) -> str:
    """User text for a line of Markdown or a table cell: nothing in it acts as Markdown or HTML."""
    text = one_line(text)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    # At the start of a line these would open a heading or a list.
    return re.sub(r"^(\d*)([#+.)-])(?=[\s#]|$)", r"\1\\\2", text)


def code_block(text: str) -> str:
    """User text as a fenced block, with a fence that the text cannot close."""
    text = clean(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _page(run: Run, rows: int) -> str:
    labels = Labels(run)
    parts = [_headline(run), _list(what_ran_where(run)), *_shards(run, rows), *_failures(run, labels, rows)]
    parts += _kills(run, rows) + _timings(run, rows) + _training(run, rows)
    for family, verdicts in families(run).items():
        if family in (FAMILY, BENCH):
            continue
        parts += [f"### {escape(family)} · {tally(verdicts)}", _family(verdicts, labels, rows)]
    tables = [part for verdict in run.verdicts for part in (*_gradients(verdict, labels), *_curves(verdict, labels))]
    parts += tables[: 2 * rows]
    if len(tables) > 2 * rows:
        parts.append(f"and {len(tables) // 2 - rows} more tables, in the record.")
    cells = [measurement_cells(measurement) for measurement in run.measurements if point_of(measurement) is None]
    if cells:
        names = ["measurement", "subject", "case", "samples", "median", "range"]
        parts += ["### Measurements", _table(names, cells, rows)]
    parts += _unchecked(run, labels, rows) + _nulls(run, rows)
    environment = environment_rows(run)
    if environment:
        table = _table(["environment", ""], [list(row) for row in environment], 200)
        parts.append(f"<details><summary>Environment</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(run: Run) -> str:
    stopped = why_not_complete(run)
    lines = [f"## {escape(verdict_line(run))}"]
    if stopped:
        seen = len(run.verdicts) + len(run.measurements) + len(run.events)
        after = f"The record holds {seen} lines after its header."
        lines.append(f"**This report is not of a whole run:** {escape(stopped)}. {after}")
    return "\n\n".join(lines)


def _shards(run: Run, rows: int) -> list[str]:
    found = shards(run)
    return [] if found is None else ["### Shards", _table(SHARD_COLUMNS, found.cells(), rows)]


def _failures(run: Run, labels: Labels, rows: int) -> list[str]:
    found = failing(run)
    if not found:
        return []
    parts = [f"### {len(found)} to look at"]
    for verdict in found[:rows]:
        parts.append(f"**{verdict.status}: {escape(labels.full(verdict))}**")
        parts.append(_bullets(escape(line) for line in failure_details(verdict)))
        if verdict.reproduce:
            parts.append(code_block(verdict.reproduce[:_LONGEST_TEXT]))
    if len(found) > rows:
        parts.append(f"and {len(found) - rows} more, in the record.")
    return parts


def _family(verdicts: list[Verdict], labels: Labels, rows: int) -> str:
    cells = []
    for verdict in verdicts:
        measure = worst(verdict)
        row = [verdict.check, labels.case(verdict), labels.dtype(verdict), verdict.status.value]
        cells.append([*row, measured(measure), used(measure), duration(verdict.seconds)])
    return _table(["check", "case", "dtype", "status", "worst / budget", "used", "time"], cells, rows)


def _training(run: Run, rows: int) -> list[str]:
    parts: list[str] = []
    for tables, notes in sections(run, _STEPS):
        for title, columns, cells in tables:
            parts += [f"### {escape(heading(title))}", _table(columns, cells, rows)]
        parts.append(_bullets(escape(note) for note in notes))
    return parts


def _kills(run: Run, rows: int) -> list[str]:
    found = kills(run)
    if found is None:
        return []
    killed = len(found.mutants) - len(found.survivors)
    parts = [f"### Kill matrix: {killed} of {len(found.mutants)} mutants killed", found.alarm_line]
    lines = found.lines()
    parts.append(code_block("\n".join(lines[: rows + 1])))
    if (left := len(lines) - rows - 1) > 0:
        parts.append(f"{left} more mutants are in report.html.")
    parts.append("A check is redundant here when another check fails each mutant that it fails.")
    parts.append(_table(["", "check", "kills", "kills that no other check makes"], found.check_cells(), rows))
    parts.append("### The mutants")
    parts.append(_table(["mutant", "what is wrong", "on record", "checks that fail it"], found.mutant_cells(), rows))
    catalogue = catalogue_cells(run)
    if catalogue:
        parts += [
            "### The catalogue of public bugs",
            _table(["entry", "mutants, or why there is none"], catalogue, rows),
        ]
    return parts


def _timings(run: Run, rows: int) -> list[str]:
    found = timings(run)
    if found is None:
        return []
    parts = ["### Time and memory", _table(COLUMNS, found.cells(), rows), *map(escape, found.notes())]
    if found.growth:
        parts += ["### Growth with the length", _table(GROWTH_COLUMNS, found.growth_cells(), rows)]
    if found.floors:
        title = "### Floors" if found.floors_are_judged() else "### Floors, which only `--floors` judges"
        parts += [title, _table(FLOOR_COLUMNS, found.floor_cells(), rows)]
    return parts


def _gradients(verdict: Verdict, labels: Labels) -> list[str]:
    table = gradient_table(verdict)
    if table is None:
        return []
    return [f"### Who gets gradient: {escape(labels.full(verdict))}", _table(table[0], table[1], 100)]


def _curves(verdict: Verdict, labels: Labels) -> list[str]:
    found = curves(verdict)
    if not found:
        return []
    steps = spread(max(len(values) for values in found.values()), 7)
    cells = []
    for name, values in found.items():
        points = [number(values[step]) if step < len(values) else "-" for step in steps]
        cells.append([name, sparkline(values), *points])
    names = ["curve", "", *(f"step {step}" for step in steps)]
    return [f"### Curves: {escape(labels.full(verdict))}", _table(names, cells, 30)]


def _unchecked(run: Run, labels: Labels, rows: int) -> list[str]:
    found = unchecked(run)
    if not found:
        return []
    lines = []
    for verdict in found[:rows]:
        reason = f" — {escape(verdict.reason)}" if verdict.reason else ""
        lines.append(f"{verdict.status}: {escape(labels.full(verdict))}{reason}")
    if len(found) > rows:
        lines.append(f"and {len(found) - rows} more, in the record.")
    return ["### Not checked", _bullets(lines)]


def _nulls(run: Run, rows: int) -> list[str]:
    cells = []
    for check, kinds in nulls_of_checks(run).items():
        passed = [kind for kind, rejected in kinds.items() if not rejected]
        cells.append([check, ", ".join(kinds), f"no: {', '.join(passed)}" if passed else "yes"])
    if not cells:
        return []
    names = ["check", "kinds", "all rejected"]
    return ["### Wrong answers that the checks were given", _table(names, cells, rows)]


def _table(names: Sequence[str], cells: Sequence[Sequence[str]], most: int) -> str:
    lines = [_row(names), "|" + " --- |" * len(names)]
    lines += [_row(row) for row in cells[:most]]
    text = "\n".join(lines)
    return text if len(cells) <= most else f"{text}\n\nand {len(cells) - most} more rows, in the record."


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escape(cell) for cell in cells) + " |"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return _bullets(f"**{escape(label)}:** {escape(text)}" for label, text in rows)
