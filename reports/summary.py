"""A run as one JSON object, for programs: the verdict, what failed, and every number that the other reports show."""

from __future__ import annotations

import json
from dataclasses import asdict

from reports.budgets import CheckUse, check_uses
from reports.guide import guide
from reports.kills import kills
from reports.records import JSON, Run, Verdict, counts, run_exit_code, verdict_line, why_not_complete
from reports.selection import selections
from reports.shards import shards
from reports.stages import first_beyond, gradient_errors, stage_errors
from reports.strict_json import dumps
from reports.timings import point_of, timings
from reports.training import training
from reports.view import failing, failure_details, unchecked

FORMAT = 1


def summary(run: Run) -> str:
    """The summary as text. What JSON has no word for is written as the texts "nan", "inf" and "-inf"."""
    errors = stage_errors(run)
    first = first_beyond(errors)
    found: dict[str, JSON] = {
        "format": FORMAT,
        "verdict": verdict_line(run),
        "exit_code": run_exit_code(run),
        "complete": run.complete,
        "problem": why_not_complete(run) or None,
        "counts": {status.value: number for status, number in counts(run).items()},
        "header": run.header,
        "shards": _shards(run),
        "to_look_at": [_failure(verdict) for verdict in failing(run)],
        "not_checked": [{**_name(verdict), "reason": verdict.reason} for verdict in unchecked(run)],
        "checks": [_check(use) for use in check_uses(run)],
        "first_beyond_budget": None if first is None else asdict(first),
        "stages": [asdict(error) for error in errors],
        "worst_gradients": [asdict(error) for error in gradient_errors(run)],
        "selection": [asdict(entry) for entry in selections(run)],
        "kills": _kills(run),
        "timings": _timings(run),
        "guide": None if (claims := guide(run)) is None else asdict(claims),
        "training": _training(run),
        "measurements": [
            {"name": item.name, "subject": item.subject, "case": item.case, "unit": item.unit, "samples": item.samples}
            for item in run.measurements
            if point_of(item) is None
        ],
    }
    # Once through the strict form, which has an answer for every float, and then as lines that a reader can follow.
    return json.dumps(json.loads(dumps(found)), indent=1) + "\n"


def _name(verdict: Verdict) -> dict[str, JSON]:
    names = ("check", "family", "subject", "case", "dtype", "device")
    return {**{name: getattr(verdict, name) for name in names}, "status": verdict.status.value}


def _failure(verdict: Verdict) -> dict[str, JSON]:
    return {**_name(verdict), "details": failure_details(verdict), "reproduce": verdict.reproduce}


def _check(use: CheckUse) -> dict[str, JSON]:
    found: dict[str, JSON] = {
        "family": use.family, "check": use.check, "subject": use.subject, "dtype": use.dtype,
        "status": use.status.value, "verdicts": len(use.verdicts), "seconds": sum(v.seconds for v in use.verdicts),
    }  # fmt: skip
    if use.worst is not None:
        verdict, measure = use.worst
        found["worst"] = {
            "case": verdict.case, "measure": measure.name, "value": measure.value, "budget": measure.budget,
            "unit": measure.unit, "used": measure.used,
        }  # fmt: skip
    return found


def _shards(run: Run) -> JSON:
    found = shards(run)
    if found is None:
        return None
    rows = [{**asdict(row), "ended": row.ended} for row in found.rows]
    return {"rows": rows, "seconds": found.seconds, "cost": found.cost}


def _kills(run: Run) -> JSON:
    found = kills(run)
    if found is None:
        return None
    return {
        "mutants": [{"name": row.name, "entry": row.entry, "killed_by": row.killed_by} for row in found.mutants],
        "survivors": found.survivors,
        "checks": [{"name": row.name, "kills": row.kills, "alone": row.alone} for row in found.checks],
    }


def _timings(run: Run) -> JSON:
    found = timings(run)
    if found is None:
        return None
    points = [
        {"pass": row.pass_, "length": row.length, "contestant": row.contestant, "backend": row.backend,
         "medians": {quantity: row.middle(quantity) for quantity in row.samples}, "samples": row.samples}
        for row in found.rows
    ]  # fmt: skip
    growth, floors = ([event.data for event in events] for events in (found.growth, found.floors))
    return {"subject": found.subject, "points": points, "growth": growth, "floors": floors}


def _training(run: Run) -> JSON:
    found = training(run)
    if found is None:
        return None
    curves = {curve.name: [list(pair) for pair in curve.values.items()] for curve in found.curves}
    return {"stage": found.stage, "steps": found.total, "parameters": found.parameters, "curves": curves}
