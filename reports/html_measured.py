"""The parts of a page that measurements fill: curves, training, the kill matrix, time and memory, the guide's tables."""

from __future__ import annotations

from collections.abc import Sequence

from reports.charts import Series, lines, matrix
from reports.guide import GROWTH_COLUMNS as GUIDE_GROWTH
from reports.guide import LENGTH_COLUMNS, MEMORY_COLUMNS
from reports.guide import guide as guide_of
from reports.kills import catalogue_cells, kills
from reports.page import Block, Chart, Folded, Section, Table, Text
from reports.plan import plan
from reports.recipe import recipe
from reports.schema import Run
from reports.text import heading, number, spread
from reports.timings import COLUMNS, FLOOR_COLUMNS, GROWTH_COLUMNS, QUANTITIES, Row, Timings, point_of, timings
from reports.training import CURVES, Curve, training
from reports.view import Labels, curves, measurement_cells

# Curves that share an axis, in the order of a page; the gradients' norms come behind them.
_TOGETHER = (
    ("Loss", "nats", ("lm_loss",)),
    ("KL of the indexer", "nats", ("kl_loss", "uniform_kl")),
    ("What the indexer captures", "share", ("captured", "recall", "left_out", "same", "collapse")),
    ("Speed", "tokens/s", ("tokens_per_second",)),
    ("Memory", "MiB", ("rss_mib",)),
)
_MOST_CHARTS = 24
# Steps of a curve that its table shows.
_STEPS = 40
# Layouts of a plan.
_LAYOUTS = 24


def curve_charts(run: Run) -> Section | None:
    """The loss and KL curves that checks recorded."""
    labels = Labels(run)
    blocks: list[Block] = []
    for verdict in run.verdicts:
        found = curves(verdict)
        if found:
            given = [Curve(name, dict(enumerate(values))) for name, values in found.items()]
            blocks.append(_curves(labels.full(verdict), "nats", given))
    cut = _too_many(blocks, "curves")
    return Section("curves", "Loss and KL curves", cut) if cut else None


def training_charts(run: Run) -> Section | None:
    """The curves of a run of `v32 train`, its parameters and what moved."""
    found = training(run)
    if found is None:
        return None
    blocks: list[Block] = [Text(note) for note in found.notes()]
    for title, unit, keys in _TOGETHER:
        drawn = [curve for curve in found.curves if curve.name in [CURVES[key] for key in keys]]
        if drawn:
            blocks.append(_curves(title, unit, drawn))
    norms = [curve for curve in found.curves if curve.name not in CURVES.values()]
    if norms:
        blocks.append(_curves("Norms of gradients", "2-norm", norms))
    tables = [Table(heading(title), columns, rows) for title, columns, rows in found.tables(7)]
    return Section("training", f"Training, stage {found.stage}", [*blocks, *tables])


def proof(run: Run) -> Section | None:
    """The table of proof of a run of `v32 recipe`."""
    found = recipe(run)
    if found is None:
        return None
    notes = [Text(note) for note in found.notes()]
    tables = [Table(title[0].upper() + title[1:], columns, rows) for title, columns, rows in found.tables()]
    return Section("recipe", "What the recipe is worth", [*notes, *tables])


def planned(run: Run) -> Section | None:
    """The tables of a run of `v32 plan`."""
    found = plan(run)
    if found is None:
        return None
    notes = [Text(note) for note in found.notes()]
    tables = [Table(title[0].upper() + title[1:], columns, rows) for title, columns, rows in found.tables(_LAYOUTS)]
    return Section("plan", "The plan", [*notes, *tables])


def _curves(title: str, unit: str, found: Sequence[Curve]) -> Chart:
    steps = sorted({step for curve in found for step in curve.values})
    shown = [steps[place] for place in spread(len(steps), _STEPS)]
    rows = [
        [str(step), *(number(curve.values[step]) if step in curve.values else "-" for curve in found)] for step in shown
    ]
    ends = []
    for curve in found:
        values = list(curve.values.values())
        ends.append(f"{curve.name} goes from {number(values[0])} to {number(values[-1])} in {len(values)} steps")
    series = [Series(curve.name, tuple(sorted(curve.values.items()))) for curve in found]
    names = ("step", *(curve.name for curve in found))
    return Chart(title, lines(series, "step", unit), "; ".join(ends) + ".", Table(f"{title}, {unit}", names, rows))


def _too_many(charts: list[Block], what: str) -> list[Block]:
    if len(charts) <= _MOST_CHARTS:
        return charts
    return [*charts[:_MOST_CHARTS], Text(f"and {len(charts) - _MOST_CHARTS} more charts of {what}, in the record.")]


def kill_matrix(run: Run) -> Section | None:
    """Which check notices which known bug."""
    found = kills(run)
    if found is None:
        return None
    killed, survivors = len(found.mutants) - len(found.survivors), found.survivors
    numbers = {check.name: check.number for check in found.checks}
    rows = [
        [row.name, row.what, row.source, str(len(row.killed_by)), ", ".join(str(numbers[name]) for name in row.killed_by)]
        for row in found.mutants
    ]  # fmt: skip
    names = ("mutant", "what is wrong", "on record", "checks that fail it", "their numbers")
    table = Table("The mutants, and the checks that fail them", names, rows)
    marks = [(place, numbers[name] - 1) for place, row in enumerate(found.mutants) for name in row.killed_by]
    svg = matrix([row.name for row in found.mutants], [f"{c.number} {c.name}" for c in found.checks], marks)
    description = f"{killed} of {len(found.mutants)} mutants are killed by {len(found.checks)} checks. " + (
        f"Nothing kills {', '.join(survivors)}." if survivors else "None survives."
    )
    checks = Table(
        "The checks; redundant is one of which another check fails each mutant that it fails",
        ("check", "number", "kills", "kills that no other check makes"),
        [[cells[1], cells[0], *cells[2:]] for cells in found.check_cells()],
    )
    blocks: list[Block] = [
        Text(description),
        Text(found.alarm_line),
        Chart("A square for each mutant that a check fails", svg, description, table, wide=True),
    ]
    blocks.append(Folded(f"The {len(found.checks)} checks", checks))
    catalogue = catalogue_cells(run)
    if catalogue:
        columns = ("entry", "mutants, or why there is none")
        blocks.append(Folded("The catalogue of public bugs", Table("The catalogue of public bugs", columns, catalogue)))
    return Section("kills", f"Kill matrix: {killed} of {len(found.mutants)} mutants killed", blocks)


def time_and_memory(run: Run) -> Section | None:
    """Time and peak growth by length, with their exponents, against peers and floors."""
    found = timings(run)
    if found is None:
        return None
    blocks: list[Block] = [Text(note) for note in found.notes()]
    for pass_ in dict.fromkeys(row.pass_ for row in found.rows):
        rows = [row for row in found.rows if row.pass_ == pass_ and "seconds" in row.samples]
        blocks += [_growth_chart(found, pass_, rows, *what) for what in (("seconds", "s"), ("peak_mib", "MiB"))]
    blocks.append(Table("Every point: medians, and the peers against the subject", COLUMNS, found.cells()))
    if found.growth:
        blocks.append(Table("Growth with the length", GROWTH_COLUMNS, found.growth_cells()))
    if found.floors:
        title = "Floors" if found.floors_are_judged() else "Floors, which only --floors judges"
        blocks.append(Table(title, FLOOR_COLUMNS, found.floor_cells()))
    return Section("time", "Time and memory", blocks)


def _growth_chart(found: Timings, pass_: str, rows: list[Row], quantity: str, unit: str) -> Chart:
    exponents = {
        event.data.get("contestant"): event.data.get("exponent")
        for event in found.growth
        if (event.data.get("pass"), event.data.get("quantity")) == (pass_, QUANTITIES[quantity])
    }
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        middle = row.middle(quantity)
        if middle is not None and middle > 0:
            values.setdefault(row.contestant, {})[row.length] = middle
    series, said = [], []
    for contestant, points in values.items():
        exponent = exponents.get(contestant)
        fitted = f" ∝ L^{exponent:.2f}" if isinstance(exponent, (int, float)) else ""
        series.append(Series(f"{contestant}{fitted}", tuple(sorted(points.items()))))
        last = max(points)
        grows = f", growing as the length to the {exponent:.2f}" if fitted else ""
        said.append(f"{contestant} takes {number(points[last], unit)} at {last} tokens{grows}")
    lengths = sorted({length for points in values.values() for length in points})
    table = Table(
        f"{pass_}: median {QUANTITIES[quantity]}, {unit}",
        ("tokens", *values),
        [[str(n), *(number(points[n]) if n in points else "-" for points in values.values())] for n in lengths],
    )
    title = f"{pass_}: {QUANTITIES[quantity]} by length"
    description = "; ".join(said) + "." if said else "Nothing was measured."
    return Chart(title, lines(series, "tokens", unit, log=True), description, table)


def guide(run: Run) -> Section | None:
    """The guide's tables beside what was measured."""
    found = guide_of(run)
    if found is None:
        return None
    blocks: list[Block] = [
        Text(found.setting),
        Table("Sparse or dense, by context length", LENGTH_COLUMNS, found.lengths),
        Table("Attention elements of a row of tokens, and what was measured", MEMORY_COLUMNS, found.memory),
        Table("Growth of memory", GUIDE_GROWTH, found.growth),
    ]
    return Section("guide", "The guide's tables, measured", blocks)


def measurements(run: Run) -> Section | None:
    """Measurements that belong to no point of a benchmark."""
    rows = [measurement_cells(item) for item in run.measurements if point_of(item) is None]
    names = ("measurement", "subject", "case", "samples", "median", "range")
    return Section("measurements", "Measurements", [Table("Measurements", names, rows)]) if rows else None
