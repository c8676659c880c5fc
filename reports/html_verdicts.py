"""The parts of a page that verdicts fill: failures, budgets, stages, selection, gradients, everything else."""

from __future__ import annotations

from reports.budgets import CheckUse, check_uses
from reports.charts import Series, lines, shares
from reports.kills import FAMILY as MUTANTS
from reports.page import Block, Chart, Failure, Folded, Section, Table, Text
from reports.schema import Run
from reports.selection import COLUMNS as SELECTION_COLUMNS
from reports.selection import OTHER_COLUMNS, LayerSelection, other_choices, selections
from reports.stages import COLUMNS as STAGE_COLUMNS
from reports.stages import STAGES, StageError, cells, first_beyond, gradient_errors, stage_errors
from reports.text import duration, number, percent
from reports.timings import FAMILY as BENCH
from reports.view import (
    Labels,
    failing,
    failure_details,
    families,
    gradient_table,
    measured,
    nulls_of_checks,
    tally,
    unchecked,
    used,
    worst,
)

# More rows than this make a chart that nobody reads; the table has them all.
_MOST_ROWS = 60
_MOST_GRADIENTS = 40


def failures(run: Run) -> Section | None:
    """What failed, with its text and the command that shows it again."""
    labels, found = Labels(run), failing(run)
    blocks = [Failure(item.status, labels.full(item), failure_details(item), item.reproduce) for item in found]
    return Section("failures", f"{len(found)} to look at", blocks) if blocks else None


def budgets(run: Run) -> Section | None:
    """Check by subject and dtype: the share of the budget that the worst case takes."""
    # Mutants and timings have sections of their own, which say more.
    uses = [use for use in check_uses(run) if use.worst is not None and use.family not in (MUTANTS, BENCH)]
    if not uses:
        return None
    several = len({use.subject for use in uses}) > 1
    blocks: list[Block] = [
        Text("For each check the case that takes the largest share of its budget; above 100 % the check fails.")
    ]
    for family in dict.fromkeys(use.family for use in uses):
        of_family = [use for use in uses if use.family == family]
        table = Table(
            f"{family}: worst share of the budget by check, subject and dtype",
            ("check", "subject", "dtype", "status", "used", "worst / budget", "in the case"),
            [_use_cells(use) for use in of_family],
        )
        blocks.append(_budget_chart(family, of_family, several, table))
    return Section("budgets", "Budgets: check by subject and dtype", blocks)


def _use_cells(use: CheckUse) -> list[str]:
    assert use.worst is not None
    verdict, measure = use.worst
    return [use.check, use.subject, use.dtype, use.status.value, used(measure), measured(measure), verdict.case]


def _budget_chart(family: str, uses: list[CheckUse], several: bool, table: Table) -> Chart:
    def share(use: CheckUse) -> float:
        assert use.worst is not None and use.worst[1].used is not None
        value = use.worst[1].used
        return float("inf") if value != value else value

    by_row: dict[str, dict[str, float]] = {}
    for use in uses:
        row = use.check.removeprefix(f"{family}.") + (f", {use.subject}" if several else "")
        by_row.setdefault(row, {})[use.dtype] = share(use)
    rows = list(by_row)
    left_out = ""
    if len(rows) > _MOST_ROWS:
        rows = sorted(rows, key=lambda row: -max(by_row[row].values()))[:_MOST_ROWS]
        left_out = f" The {_MOST_ROWS} checks that take most are drawn."
    dtypes = list(dict.fromkeys(use.dtype for use in uses))
    series = [(dtype or "any dtype", [by_row[row].get(dtype) for row in rows]) for dtype in dtypes]
    top = max(uses, key=share)
    beyond = sum(share(use) > 1 for use in uses)
    description = (
        f"The largest is {top.check} {top.dtype} with {percent(share(top))} of its budget; "
        f"{beyond} of {len(uses)} are beyond their budgets.{left_out}"
    )
    return Chart(family, shares(rows, series, "share of the budget"), description, table)


def stages(run: Run) -> Section | None:
    """Errors by layer and stage, so that a reader sees where two models part."""
    errors, gradients = stage_errors(run), gradient_errors(run)
    if not errors and not gradients:
        return None
    first = first_beyond(errors)
    blocks: list[Block] = [Text(_where(first))]
    by_layer = [error for error in errors if error.layer is not None and error.source != "choices.keys"]
    if by_layer:
        blocks.append(_stage_chart(by_layer))
    if errors:
        rows = [cells(error, _share(error.used)) for error in errors]
        caption = "Errors in the order of a forward, as shares of their budgets"
        blocks.append(Folded(f"All {len(rows)} errors by stage and layer", Table(caption, STAGE_COLUMNS, rows)))
        blocks.append(_stage_table(errors))
    if gradients:
        rows = [cells(error, _share(error.used)) for error in gradients[:_MOST_GRADIENTS]]
        caption = "The worst gradients, by the layer and stage that their parameter belongs to"
        blocks.append(Folded(caption, Table(caption, STAGE_COLUMNS, rows)))
    return Section("stages", "Where the models part", blocks)


def _where(first: StageError | None) -> str:
    if first is None:
        return "No stage is beyond its budget."
    layer = "" if first.layer is None else f" of layer {first.layer}"
    return (
        f"In the order of a forward the first stage beyond its budget is {first.stage}{layer} "
        f"({first.dtype}, {first.case}), by {first.source}."
    )


def _share(used: float) -> str:
    """A share in words; of a budget of nothing there is none."""
    return "beyond" if used == float("inf") else percent(used)


def _stage_table(errors: list[StageError]) -> Table:
    """Stages as rows, layers as columns: the worst share."""
    layers = sorted({error.layer for error in errors if error.layer is not None})
    places: list[int | None] = [*layers, None]
    rows = []
    for stage in STAGES:
        found = [
            max((e.used for e in errors if (e.stage, e.layer) == (stage, layer)), default=None) for layer in places
        ]
        rows.append([stage, *("-" if share is None else _share(share) for share in found)])
    names = ["stage", *(f"layer {layer}" for layer in layers), "as a whole"]
    return Table("Worst share of the budget by stage and layer; - where nothing measured it", names, rows)


def _stage_chart(errors: list[StageError]) -> Chart:
    dtypes = list(dict.fromkeys(error.dtype for error in errors))
    points: dict[tuple[str, str], float] = {}
    for error in errors:
        key = (f"layer {error.layer} {error.stage}", error.dtype)
        points[key] = max(points.get(key, 0.0), error.used)
    rows = list(dict.fromkeys(row for row, _ in points))
    drawn = rows[:_MOST_ROWS]
    svg = shares(
        drawn, [(dtype, [points.get((row, dtype)) for row in drawn]) for dtype in dtypes], "share of the budget"
    )
    table = Table(
        "Worst share of the budget by layer and stage",
        ("layer and stage", *dtypes),
        [[row, *(_share(points[row, dtype]) if (row, dtype) in points else "-" for dtype in dtypes)] for row in rows],
    )
    worst_row, worst_share = max(points.items(), key=lambda item: item[1])
    return Chart("Error by layer and stage", svg, f"The largest is {_share(worst_share)} at {worst_row[0]}.", table)


def selection(run: Run) -> Section | None:
    """Margins and flips of each layer's selection, and what the other checks of choices counted."""
    found, others = selections(run), other_choices(run)
    if not found and not others:
        return None
    blocks: list[Block] = []
    if found:
        rows = [entry.cells() for entry in found]
        table = Table("Selection by case, dtype and layer", SELECTION_COLUMNS, rows)
        wrong, flips = (sum(getattr(entry, name) for entry in found) for name in ("wrong", "flips"))
        blocks.append(
            Text(
                f"{number(wrong)} keys are wrong, {number(flips)} differ within the margin. The margin is what the "
                "reference's own scores move by in the same precision, so that a key nearer to the boundary proves nothing."
            )
        )
        for title, name in (("Margin by layer", "margin"), ("Keys that differ within the margin, by layer", "flips")):
            series = _by_layer(found, name)
            top = max(found, key=lambda entry: getattr(entry, name))
            description = (
                f"The largest is {number(getattr(top, name))}, in layer {top.layer} of {top.case} {top.dtype}."
            )
            blocks.append(Chart(title, lines(series, "layer", name), description, table))
    if others:
        caption = "Experts, the first layer in bf16, free runs"
        blocks.append(Folded(caption, Table(caption, OTHER_COLUMNS, others)))
    return Section("selection", "Selection: margins and flips", blocks)


def _by_layer(found: list[LayerSelection], name: str) -> list[Series]:
    """The largest value over the cases, a series a dtype."""
    values: dict[str, dict[int, float]] = {}
    for entry in found:
        row = values.setdefault(entry.dtype, {})
        row[entry.layer] = max(row.get(entry.layer, 0.0), getattr(entry, name))
    return [Series(dtype or "any dtype", tuple(sorted(row.items()))) for dtype, row in values.items()]


def gradients(run: Run) -> Section | None:
    """Who gets gradient, and in which training mode."""
    labels = Labels(run)
    blocks = [
        Table(f"Who gets gradient: {labels.full(verdict)}", table[0], table[1])
        for verdict in run.verdicts
        if (table := gradient_table(verdict)) is not None
    ]
    return Section("gradients", "Who gets gradient", blocks) if blocks else None


def verdicts(run: Run) -> Section | None:
    """Every verdict, by family."""
    labels = Labels(run)
    blocks = []
    for family, found in families(run).items():
        rows = [
            [verdict.check, labels.case(verdict), labels.dtype(verdict), verdict.status.value,
             measured(worst(verdict)), used(worst(verdict)), duration(verdict.seconds)]
            for verdict in found
        ]  # fmt: skip
        names = ("check", "case", "dtype", "status", "worst / budget", "used", "time")
        blocks.append(Folded(f"{family} · {tally(found)}", Table(f"Verdicts of {family}", names, rows)))
    return Section("verdicts", "All verdicts", blocks) if blocks else None


def not_checked(run: Run) -> Section | None:
    """What was skipped or does not apply, and why."""
    labels, found = Labels(run), unchecked(run)
    rows = [[labels.full(verdict), verdict.status.value, verdict.reason] for verdict in found]
    table = Table("Not checked", ("check", "status", "why"), rows)
    return Section("not-checked", "Not checked", [table]) if rows else None


def nulls(run: Run) -> Section | None:
    """The wrong answers that each check was given."""
    rows = []
    for check, kinds in nulls_of_checks(run).items():
        passed = [kind for kind, rejected in kinds.items() if not rejected]
        rows.append([check, f"no: {', '.join(passed)}" if passed else "yes", ", ".join(kinds)])
    if not rows:
        return None
    accepted = sum(row[1] != "yes" for row in rows)
    summary = f"{len(rows)} checks were given wrong answers; {accepted or 'none'} accepted one"
    table = Table("Wrong answers that the checks were given", ("check", "all rejected", "kinds"), rows)
    return Section("nulls", "Wrong answers that the checks were given", [Folded(summary, table)])
