"""A run on a terminal: progress while it goes, tables when it is read back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from reports.kills import FAMILY, kills
from reports.recipe import sections
from reports.records import FAILING, Measurement, Run, Status, Verdict, run_exit_code, verdict_line
from reports.shards import COLUMNS as SHARD_COLUMNS
from reports.shards import DETAILS as SHARD_DETAILS
from reports.shards import shards
from reports.text import ascii_only, clean, duration, number, one_line, sparkline, spread
from reports.timings import COLUMNS, DETAILS, FLOOR_COLUMNS, GROWTH_COLUMNS, point_of, timings
from reports.timings import FAMILY as BENCH
from reports.view import (
    Labels,
    curves,
    failing,
    failure_details,
    families,
    gradient_table,
    measured,
    measurement_cells,
    tally,
    used,
    what_ran_where,
    worst,
)

_STYLES = {
    Status.VERIFIED: "green",
    Status.FAILED: "bold red",
    Status.VACUOUS: "bold magenta",
    Status.ERROR: "bold red",
    Status.SKIPPED: "yellow",
    Status.NOT_APPLICABLE: "dim",
}
# Below this width a table leaves columns out.
_WIDE = 110
# Columns that are short and would be hard to read when broken.
_WHOLE = ("group", "status", "used", "time", "samples", "pass", "contestant")


# Words of the gradient table, which seven of them a row would not fit beside.
_SIGNS = {"finite": "●", "none": "·", "zero": "0"}


def shown(console: Console, text: str, style: str = "") -> Text:
    """User text as it is: neither its markup nor its control characters act."""
    text = clean(text)
    return Text(ascii_only(text) if console.options.ascii_only else text, style=style)


def print_line(console: Console, text: str, style: str = "") -> None:
    """A line that is not wrapped, so that it can be copied or searched for."""
    console.print(shown(console, text, style), soft_wrap=True)


class Progress:
    """Shows a run while it goes: a bar on a terminal, elsewhere one line a verdict.

    `with Progress(console, total) as shown:`, then `shown.start("parity.logits", "tiny")` when a check begins
    and `shown.done(verdict)` when it has answered.
    """

    def __init__(self, console: Console | None = None, total: int | None = None) -> None:
        self.console = console or Console()
        self._verdicts: list[Verdict] = []
        self._bar: progress.Progress | None = None
        if self.console.is_interactive:
            fitting = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._bar = progress.Progress(
                progress.BarColumn(bar_width=16),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.description}", markup=False, table_column=fitting),
                console=self.console,
                transient=True,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, check: str, case: str = "", dtype: str = "") -> None:
        """Say which check runs now."""
        if self._bar is not None:
            parts = (check, dtype, case, tally(self._verdicts))
            line = "  ".join(one_line(part) for part in parts if part)
            self._bar.update(self._task, description=shown(self.console, line).plain)

    def done(self, verdict: Verdict) -> None:
        """Count a verdict; on a terminal only those that need reading get a line."""
        self._verdicts.append(verdict)
        if self._bar is None:
            print_line(self.console, plain_line(verdict))
            return
        if verdict.status in FAILING:
            print_line(self.console, plain_line(verdict), _STYLES[verdict.status])
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Say something that is no verdict, such as the machine that was received."""
        print_line(self.console, text)


def plain_line(verdict: Verdict) -> str:
    """A verdict in one line: status, check, dtype, case, share of the budget, time, reason."""
    measure = worst(verdict)
    share = "" if measure is None or measure.used is None else f"{measure.used:.2f} of budget"
    named = (verdict.status.value, verdict.check, verdict.dtype, verdict.case)
    parts = (*named, share, duration(verdict.seconds), verdict.reason)
    return "  ".join(one_line(part) for part in parts if part)


def render(run: Run, console: Console) -> None:
    """Print the whole run; its verdict is the last line."""
    labels = Labels(run)
    _header(run, console)
    _shards(run, console)
    _kills(run, console)
    _timings(run, console)
    _training(run, console)
    for family, verdicts in families(run).items():
        if family in (FAMILY, BENCH):
            continue
        _family(family, verdicts, labels, console)
    for verdict in run.verdicts:
        _curves(verdict, labels, console)
        _gradients(verdict, labels, console)
    others = tuple(item for item in run.measurements if point_of(item) is None)
    if others:
        _measurements(others, console)
    _failures(run, labels, console)
    style = "bold green" if run_exit_code(run) == 0 else "bold red"
    print_line(console, verdict_line(run), style)


def _header(run: Run, console: Console) -> None:
    rows = what_ran_where(run)
    if not rows:
        return
    table = Table.grid(Column(style="bold"), Column(overflow="fold"), padding=(0, 2, 0, 0))
    for label, text in rows:
        table.add_row(shown(console, label), shown(console, one_line(text)))
    console.print(table)
    console.print()


def _shards(run: Run, console: Console) -> None:
    found = shards(run)
    if found is None:
        return
    chosen = [i for i in range(len(SHARD_COLUMNS)) if console.width >= _WIDE or i not in SHARD_DETAILS]
    rows = [[shown(console, one_line(row[i])) for i in chosen] for row in found.cells()]
    _table("shards", [SHARD_COLUMNS[i] for i in chosen], rows, console)


def _table(title: str, columns: list[str], rows: list[list[Text]], console: Console) -> None:
    console.print(shown(console, one_line(title), "bold"), overflow="fold")
    heads = [Column(shown(console, name), overflow="fold", no_wrap=name in _WHOLE) for name in columns]
    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print()


def _family(family: str, verdicts: list[Verdict], labels: Labels, console: Console) -> None:
    # Below this width values and reasons would break into single letters; the share of the budget stays.
    wide = console.width >= _WIDE
    with_reason = wide and any(verdict.reason for verdict in verdicts)
    columns = ["check", "case", "dtype", "status", *(["worst / budget"] if wide else []), "used", "time"]
    rows = []
    for verdict in verdicts:
        measure = worst(verdict)
        cells = [verdict.check, labels.case(verdict), labels.dtype(verdict), verdict.status.value]
        cells += [measured(measure)] if wide else []
        cells += [used(measure), duration(verdict.seconds)]
        cells += [verdict.reason] if with_reason else []
        row = [shown(console, one_line(cell)) for cell in cells]
        row[3].stylize(_STYLES[verdict.status])
        rows.append(row)
    _table(f"{family} · {tally(verdicts)}", [*columns, "reason"] if with_reason else columns, rows, console)
    reasons = [verdict for verdict in verdicts if verdict.reason and verdict.status not in FAILING]
    if reasons and not wide:
        for verdict in reasons:
            line = one_line(f"{labels.full(verdict)}: {verdict.reason}")
            console.print(shown(console, line), overflow="fold")
        console.print()


def _kills(run: Run, console: Console) -> None:
    found = kills(run)
    if found is None:
        return
    killed = len(found.mutants) - len(found.survivors)
    console.print(Text(f"kill matrix: {killed} of {len(found.mutants)} mutants killed", style="bold"))
    for line in found.lines():
        print_line(console, line)
    console.print()
    cells = [[shown(console, one_line(cell)) for cell in row] for row in found.check_cells()]
    _table("checks", ["", "check", "kills", "kills that no other check makes"], cells, console)


def _timings(run: Run, console: Console) -> None:
    found = timings(run)
    if found is None:
        return
    floors = "floors" if found.floors_are_judged() else "floors, which only --floors judges"
    points = [i for i in range(len(COLUMNS)) if console.width >= _WIDE or i not in DETAILS]
    for title, columns, cells in (
        ("time and memory", [COLUMNS[i] for i in points], [[row[i] for i in points] for row in found.cells()]),
        ("growth with the length", GROWTH_COLUMNS, found.growth_cells()),
        (floors, FLOOR_COLUMNS, found.floor_cells()),
    ):
        if cells:
            _table(title, list(columns), [[shown(console, one_line(cell)) for cell in row] for row in cells], console)
    for note in found.notes():
        console.print(shown(console, note), overflow="fold")
    console.print()


def _training(run: Run, console: Console) -> None:
    for tables, notes in sections(run, _columns(console)):
        for title, columns, cells in tables:
            plain = [[one_line(cell) for cell in row] for row in cells]
            for part, (names, rows) in enumerate(_fitting(columns, plain, console.width)):
                named = f"{title}, continued" if part else title
                _table(named, names, [[shown(console, cell) for cell in row] for row in rows], console)
        for note in notes:
            console.print(shown(console, note), overflow="fold")
        console.print()


# Spaces between two columns of a table.
_BETWEEN = 2
# A table of fewer columns is prose in cells, which folds well.
_MANY_COLUMNS = 6


def _width(column: Sequence[str]) -> int:
    """What a column takes, its head folded between words."""
    head, *cells = column
    return max(map(len, [*head.split(), *cells, ""])) + _BETWEEN


def _fitting(columns: list[str], cells: list[list[str]], width: int) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The table as it is where it fits; else turned on its side, in as many parts as it takes."""
    whole = list(zip(columns, *cells, strict=True))
    if len(columns) < _MANY_COLUMNS or not cells or sum(map(_width, whole)) <= width:
        yield columns, cells
        return
    first, *others = [columns, *cells]
    room = width - max(map(len, first)) - _BETWEEN
    part: list[list[str]] = []
    for other in [*others, None]:
        taken = sum(map(_width, [*part, *([other] if other else [])]))
        if part and (other is None or taken > room):
            names, *rows = [list(row) for row in zip(first, *part, strict=True)]
            yield names, rows
            part = []
        if other is not None:
            part.append(other)


def _columns(console: Console) -> int:
    """How many steps of a curve fit beside its name and its bars."""
    return max(2, min(9, (console.width - 36) // 9))


def _curves(verdict: Verdict, labels: Labels, console: Console) -> None:
    found = curves(verdict)
    if not found:
        return
    steps = spread(max(len(values) for values in found.values()), _columns(console))
    rows = []
    for name, values in found.items():
        points = [number(values[step]) if step < len(values) else "-" for step in steps]
        rows.append([shown(console, one_line(cell)) for cell in (name, sparkline(values), *points)])
    columns = ["curve", "", *(f"step {step}" for step in steps)]
    _table(f"curves of {labels.full(verdict)}", columns, rows, console)


def _gradients(verdict: Verdict, labels: Labels, console: Console) -> None:
    table = gradient_table(verdict)
    if table is not None:
        rows = [[shown(console, _SIGNS.get(cell, one_line(cell))) for cell in row] for row in table[1]]
        columns = [one_line(name) for name in table[0]]
        legend = ", ".join(f"{sign} {word}" for word, sign in _SIGNS.items())
        _table(f"who gets gradient ({legend}): {labels.full(verdict)}", columns, rows, console)


def _measurements(measurements: tuple[Measurement, ...], console: Console) -> None:
    rows = [[shown(console, one_line(cell)) for cell in measurement_cells(item)] for item in measurements]
    _table("measurements", ["name", "subject", "case", "samples", "median", "range"], rows, console)


def _failures(run: Run, labels: Labels, console: Console) -> None:
    found = failing(run)
    if not found:
        return
    console.print(Text(f"{len(found)} to look at", style="bold"))
    for verdict in found:
        print_line(console, one_line(f"{verdict.status}: {labels.full(verdict)}"), _STYLES[verdict.status])
        for line in failure_details(verdict):
            console.print(shown(console, f"  {line}"), overflow="fold")
        if verdict.reproduce:
            print_line(console, f"$ {verdict.reproduce}")
        console.print()
