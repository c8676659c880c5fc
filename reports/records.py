"""The schema of a run's record file: JSON Lines, one file a run. Its public names are imported from here.

Line 1 is the header, then come verdicts, measurements and events in the order in which they happened, and the
last line is the footer. A file without footer is a run that did not end. Each line says what it is under
"record". The header's keys that reports know: subject, reference, claim, config, device_asked, device,
dtypes, backend, seed, command and environment (what `harness.environment.capture` returns); others are kept.

`schema.py` holds the types, `writing.py` and `reading.py` the two directions, this file
what a run amounts to.
"""

from __future__ import annotations

from reports.reading import read_run
from reports.schema import (
    FAILING,
    RUN_FILE,
    SCHEMA_VERSION,
    Event,
    Measure,
    Measurement,
    NullCandidate,
    RecordError,
    Run,
    Status,
    Verdict,
    count_statuses,
    exit_code,
)
from reports.strict_json import JSON
from reports.writing import RunWriter, write_text_atomically

__all__ = [
    "FAILING",
    "JSON",
    "RUN_FILE",
    "SCHEMA_VERSION",
    "Event",
    "Measure",
    "Measurement",
    "NullCandidate",
    "RecordError",
    "Run",
    "RunWriter",
    "Status",
    "Verdict",
    "count_statuses",
    "counts",
    "exit_code",
    "read_run",
    "run_exit_code",
    "verdict_line",
    "why_not_complete",
    "write_text_atomically",
]


def counts(run: Run) -> dict[Status, int]:
    """How many verdicts of the run have each status, in the order of `Status`."""
    return count_statuses(verdict.status for verdict in run.verdicts)


def run_exit_code(run: Run) -> int:
    """The exit code of a run that was read: its own when it ended well, never 0 when it did not end."""
    code = exit_code(verdict.status for verdict in run.verdicts)
    if code or not run.complete or run.footer is None:
        return code or 3
    own = run.footer.get("exit_code")
    return own if isinstance(own, int) else 0


def verdict_line(run: Run) -> str:
    """The run in one line: how many of each status, and what follows from it."""
    tally = " · ".join(f"{status} {number}" for status, number in counts(run).items())
    named = _failing_named(run)
    if not run.complete:
        line = f"{why_not_complete(run)}: {tally}" + (f" — {named}" if named else "")
    elif named:
        line = f"{tally} — {named}"
    elif not any(verdict.status is Status.VERIFIED for verdict in run.verdicts):
        line = f"{tally} — nothing was verified"
    elif run_exit_code(run) == 4:
        line = f"{tally} — SLOWER OR LESS ACCURATE than the baseline"
    else:
        claim = run.header.get("claim")
        agrees = f"{_subjects(run)} agrees with the reference"
        line = f"{tally} — {claim if isinstance(claim, str) else agrees}"
    return " ".join(line.split())


def why_not_complete(run: Run) -> str:
    """Why the run counts as not ended, or an empty text."""
    footer = run.footer
    if run.problem is not None:
        return ("run is damaged: " if footer is not None else "run did not end: ") + run.problem.rstrip(".")
    if footer is None:
        return "run did not end: the file has no footer"
    if footer.get("ended") == "complete":
        return ""
    reason = footer.get("reason")
    return f"run did not end: {footer.get('ended')}" + (f" by {reason}" if isinstance(reason, str) else "")


def _failing_named(run: Run, most: int = 5) -> str:
    failing = [verdict for status in FAILING for verdict in run.verdicts if verdict.status is status]
    parts = []
    for status in FAILING:
        names = [
            f"{verdict.check} ({verdict.dtype})" if verdict.dtype else verdict.check
            for verdict in failing[:most]
            if verdict.status is status
        ]
        if names:
            parts.append(f"{status.upper()}: {', '.join(names)}")
    if len(failing) > most:
        parts.append(f"and {len(failing) - most} more")
    return "; ".join(parts)


def _subjects(run: Run) -> str:
    subject = run.header.get("subject")
    if isinstance(subject, str) and subject:
        return subject
    return ", ".join(dict.fromkeys(verdict.subject for verdict in run.verdicts))
