"""What a page is made of, and how it becomes one file: templates, escaping, ids.

Nothing in a page runs or is fetched: its policy forbids both, and whatever comes from a record is cleaned and escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from reports.charts import placed
from reports.schema import Status
from reports.text import clean

# What a reader sees beside the word of a status, so that it is not told by its colour alone.
SIGNS = {
    Status.VERIFIED: "✓", Status.FAILED: "✗", Status.VACUOUS: "∅", Status.ERROR: "!", Status.SKIPPED: "–",
    Status.NOT_APPLICABLE: "–",
}  # fmt: skip
_NUMBER = re.compile(r"[-+−≤<]?(\d[\d,.]*(e[-+]?\d+)?|nan|inf)( ?(%|x|s|MiB|GFLOP/s))?|-|")
_LONGEST = 4000
# It is to be under 2 MB; the rest is for who counts 2,000,000 and for who counts characters.
_FITS = 1_950_000


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a caption; the first cell names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: int = 0
    kind: str = field(default="table", init=False)

    def cut(self, most: int) -> Table:
        """At most `most` rows, and how many more there are."""
        return Table(self.caption, self.columns, self.rows[:most], self.left_out + max(0, len(self.rows) - most))

    def numeric(self, column: int) -> bool:
        """Whether all cells of a column are numbers, so that they stand at its right."""
        return column > 0 and all(_NUMBER.fullmatch(row[column]) for row in self.rows if column < len(row))


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture, what it shows in words, and the numbers behind it; a wide one has a row to itself."""

    title: str
    svg: str
    description: str
    table: Table
    wide: bool = False
    kind: str = field(default="chart", init=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = field(default="text", init=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """Something to look at: its text, and the command that shows it again."""

    status: Status
    title: str
    details: Sequence[str]
    command: str
    kind: str = field(default="failure", init=False)


@dataclass(frozen=True, slots=True)
class Folded:
    """A table that is shown on demand."""

    summary: str
    table: Table
    kind: str = field(default="folded", init=False)


Block = Table | Chart | Text | Failure | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page under a heading; `id` is what a link to it names."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page: a word for the verdict and whether it is a good one, its sentence, its sections.

    `command` is what makes the page again, `warning` what stands before everything else.
    """

    kicker: str
    word: str
    good: bool
    line: str
    sections: Sequence[Section]
    command: str
    warning: str = ""


def page(content: Page) -> str:
    """The page as one file of HTML; long tables are cut, and say so, until it is below `_FITS` bytes."""
    charts = [block for section in content.sections for block in section.blocks if isinstance(block, Chart)]
    pictures = {
        chart.svg: Markup(placed(chart.svg, f"c{number}", f"{chart.title}. {chart.description}"))
        for number, chart in enumerate(charts, 1)
    }
    template = _ENVIRONMENT.get_template("report.html.j2")
    for rows in (3000, 1000, 300, 100, 30, 10):
        sections = [Section(section.id, section.title, _cut(section.blocks, rows)) for section in content.sections]
        text = template.render(
            page=replace(content, sections=sections),
            picture=lambda chart: pictures[chart.svg],
            signs={status.value: sign for status, sign in SIGNS.items()},
        )
        if len(text.encode()) < _FITS:
            break
    return text


def _cut(blocks: Sequence[Block], rows: int) -> list[Block]:
    """The blocks with at most `rows` rows a table and as many failures."""
    kept: list[Block] = []
    failures = [block for block in blocks if isinstance(block, Failure)]
    for block in blocks:
        if isinstance(block, Table):
            kept.append(block.cut(rows))
        elif isinstance(block, (Chart, Folded)):
            kept.append(replace(block, table=block.table.cut(rows)))
        elif block not in failures[rows:]:
            kept.append(block)
    left_out = len(failures) - rows
    return [*kept, Text(f"and {left_out} more, in the record.")] if left_out > 0 else kept


def _groups(blocks: Iterable[Block]) -> list[list[Block]]:
    """Blocks that stand together: charts beside each other, everything else by itself."""
    return [list(group) for _, group in groupby(blocks, key=lambda block: block.kind == "chart")]


def _shown(value: object) -> object:
    """User text as a page shows it: none of its characters acts, and none of it is endless."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = clean(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


_ENVIRONMENT = Environment(
    loader=PackageLoader("reports"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["groups"] = _groups
