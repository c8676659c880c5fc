"""A comparison of two runs as a page, as Markdown and on a terminal: one content, laid out three times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table as TerminalTable

from reports.compare import Comparison, Difference, Drift, StatusChange
from reports.markdown import escape
from reports.page import Page, Section, Table, Text, page
from reports.terminal import print_line, shown
from reports.text import number, one_line

T = TypeVar("T", StatusChange, Drift)

# A comment on a pull request may hold 65,536 characters.
_FITS = 60_000
_NOTES = {
    "hardware": "The runs are of different hardware: times and memory are not judged.",
    "version": "The runs are of different versions or switches.",
    "input": "The runs have different inputs: neither times nor accuracy are judged.",
    "request": "The runs were asked for different things.",
}
_ORDER = ("worse", "better", "not judged", "equal")


def sections(found: Comparison) -> list[Section]:
    """What a reader asks for, what got worse first."""
    made = [
        _section("statuses", "Changed answers", ("check", "subject", "case", "dtype", "before", "after", "judged", "why"),
                 map(_status, _ordered(found.statuses))),
        _section("accuracy", "Accuracy", ("check", "before", "after", "ratio", "judged", "why"),
                 ([*cells[:5], cells[6]] for cells in map(_drift, _ordered(found.accuracy)))),
        _section("times", "Time and memory", ("point", "before", "after", "ratio", "judged", "p", "why"),
                 map(_drift, _ordered(found.times))),
        _section("differences", "Under what the runs differ", ("what", "kind", "before", "after"),
                 map(_difference, found.differences)),
        _section("missing", "Missing from the second run", ("check or point",), ([name] for name in found.missing)),
        _section("new", "New in the second run", ("check or point",), ([name] for name in found.new)),
    ]  # fmt: skip
    notes = [_NOTES[kind] for kind in dict.fromkeys(difference.kind for difference in found.differences)]
    if notes:
        made.insert(0, Section("notes", "Read this first", [Text(note) for note in notes]))
    return [section for section in made if section is not None]


def html(found: Comparison, names: tuple[str, str]) -> str:
    """The comparison as one page."""
    words = {0: "Nothing is worse", 3: "Not comparable to the end", 4: "Slower or less accurate"}
    return page(
        Page(
            kicker=f"v32 compare · {names[0]} → {names[1]}",
            word=words[found.exit_code],
            good=found.exit_code == 0,
            line=found.line(),
            sections=sections(found),
            command="v32 compare",
        )
    )


def markdown(found: Comparison, names: tuple[str, str]) -> str:
    """The comparison as Markdown; long tables are cut, and say so, until it fits a comment."""
    for rows in (1000, 100, 30, 10, 3):
        parts = [f"## {escape(found.line())}", f"{escape(names[0])} → {escape(names[1])}"]
        for section in sections(found):
            parts.append(f"### {escape(section.title)}")
            for block in section.blocks:
                if isinstance(block, Text):
                    parts.append(escape(block.text))
                elif isinstance(block, Table):
                    parts.append(_markdown_table(block.cut(rows)))
        text = "\n\n".join(parts) + "\n"
        if len(text) <= _FITS:
            break
    return text


def render(found: Comparison, console: Console) -> None:
    """Print what changed; the comparison in one line is the last line."""
    for section in sections(found):
        console.print(shown(console, one_line(section.title), "bold"))
        for block in section.blocks:
            if isinstance(block, Text):
                console.print(shown(console, block.text))
            elif isinstance(block, Table):
                _terminal_table(block, console)
        console.print()
    print_line(console, found.line(), "bold green" if found.exit_code == 0 else "bold red")


def _section(name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Section | None:
    cells = [list(row) for row in rows]
    return Section(name, title, [Table(title, columns, cells)]) if cells else None


def _ordered(items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda item: _ORDER.index(item.word))


def _status(change: StatusChange) -> list[str]:
    return [change.check, change.subject, change.case, change.dtype, change.before.value, change.after.value,
            change.word, change.reason]  # fmt: skip


def _drift(drift: Drift) -> list[str]:
    p = "-" if drift.p is None else number(drift.p)
    return [drift.name, drift.before, drift.after, f"{drift.ratio:.3g}x", drift.word, p, drift.why]


def _difference(difference: Difference) -> list[str]:
    return [difference.name, difference.kind, difference.before, difference.after]


def _markdown_table(table: Table) -> str:
    rows = [table.columns, *table.rows]
    lines = ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(table.columns))
    more = f"\n\nand {table.left_out} more rows, in the records." if table.left_out else ""
    return "\n".join(lines) + more


def _terminal_table(table: Table, console: Console) -> None:
    drawn = TerminalTable(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(shown(console, one_line(cell)) for cell in row))
    console.print(drawn)
