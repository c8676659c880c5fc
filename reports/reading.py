"""Reads the file of a run, however it ended.

A file may be cut at any byte, and a line of it may be damaged: what can be read is given back, with one
sentence that says where the rest is. Only a file that was never a record is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

from reports.schema import (
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
)
from reports.strict_json import JSON, loads

Fields: TypeAlias = dict[str, JSON]
T = TypeVar("T")

# The writer puts these first, so that a header cut inside is still told from a file of another kind.
_HEADER_START = b'{"record":"header","schema":'
_NO_HEADER = "path {} is not a record file: its first line is no header."
_ENDS = ("complete", "interrupted", "error")


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a record file, or the one in a directory.

    A cut or damaged line is left out and named in `problem`. RecordError when there is no such file, when it
    is not a record file, or when its schema version is not known.
    """
    target = Path(path)
    if target.is_dir():
        target = target / RUN_FILE
    try:
        content = target.read_bytes()
    except OSError as error:
        reason = error.strerror
        raise RecordError(f"path {target} cannot be read: {reason}; allowed is a record file.") from None
    return _read(content, str(target))


def _read(content: bytes, name: str) -> Run:
    *whole, rest = content.split(b"\n")
    lines = [*whole, rest] if rest or not whole else whole
    header: Fields = {}
    body = _Body()
    problems: list[str] = []
    start = 0
    for number, line in enumerate(lines, start=1):
        try:
            fields = _fields(loads(line))
            if number == 1:
                header = _header(fields, name)
            else:
                body.add(fields)
        except RecordError:
            raise
        except (ValueError, OverflowError) as error:
            cut = number > len(whole)
            if number == 1 and not _starts_a_header(line, cut):
                raise RecordError(_NO_HEADER.format(name)) from None
            problems.append(_sentence(number, start, start + len(line), None if cut else error))
        start += len(line) + 1
    more = f" {len(problems) - 1} more cannot be read." if len(problems) > 1 else ""
    return Run(
        header=header,
        verdicts=tuple(body.verdicts),
        measurements=tuple(body.measurements),
        events=tuple(body.events),
        footer=body.footer,
        problem=problems[0] + more if problems else None,
    )


def _starts_a_header(line: bytes, cut: bool) -> bool:
    return line.startswith(_HEADER_START) or (cut and _HEADER_START.startswith(line))


def _sentence(number: int, start: int, end: int, error: Exception | None) -> str:
    if error is None:
        return f"line {number}, which starts at byte {start}, is cut at byte {end} and was left out."
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 200 else reason[:200] + "…"
    return f"line {number}, bytes {start} to {end}, is damaged and was left out: {reason.rstrip('.')}."


def _header(fields: Fields, name: str) -> Fields:
    if fields.pop("record", None) != "header" or "schema" not in fields:
        raise RecordError(_NO_HEADER.format(name))
    version = fields.pop("schema")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise RecordError(f"path {name} has the schema version {version!r}; allowed is {SCHEMA_VERSION}.")
    return fields


@dataclass
class _Body:
    verdicts: list[Verdict] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    footer: Fields | None = None

    def add(self, fields: Fields) -> None:
        kind = fields.pop("record", None)
        if self.footer is not None:
            raise ValueError("it comes after the footer")
        if kind == "verdict":
            self.verdicts.append(_verdict(fields))
        elif kind == "measurement":
            self.measurements.append(_measurement(fields))
        elif kind == "event":
            data = _fields(fields.get("data", {}))
            self.events.append(Event(_text(fields, "kind"), _number(fields, "at"), data))
        elif kind == "footer":
            if fields.get("ended") not in _ENDS:
                raise ValueError(f"ended is {fields.get('ended')!r}; allowed are {', '.join(_ENDS)}")
            self.footer = fields
        else:
            raise ValueError(f"record is {kind!r}; allowed are verdict, measurement, event and footer")


def _verdict(fields: Fields) -> Verdict:
    status = _text(fields, "status")
    if status not in set(Status):
        raise ValueError(f"status is {status!r}; allowed are {', '.join(Status)}")
    try:
        return Verdict(
            check=_text(fields, "check"),
            family=_text(fields, "family"),
            subject=_text(fields, "subject"),
            case=_text(fields, "case"),
            status=Status(status),
            dtype=_text(fields, "dtype", ""),
            device=_text(fields, "device", ""),
            reason=_text(fields, "reason", ""),
            measures=_items(fields, "measures", _measure),
            nulls=_items(fields, "nulls", _null),
            seconds=_number(fields, "seconds", 0.0),
            reproduce=_text(fields, "reproduce", ""),
            data=_fields(fields.get("data", {})),
        )
    except RecordError as error:
        raise ValueError(str(error)) from None


def _measurement(fields: Fields) -> Measurement:
    samples = _items(fields, "samples", lambda item: _number({"samples": item}, "samples"))
    return Measurement(
        name=_text(fields, "name"),
        subject=_text(fields, "subject"),
        case=_text(fields, "case"),
        samples=samples,
        unit=_text(fields, "unit", ""),
        data=_fields(fields.get("data", {})),
    )


def _measure(item: JSON) -> Measure:
    fields = _fields(item)
    budget = None if fields.get("budget") is None else _number(fields, "budget")
    return Measure(_text(fields, "name"), _number(fields, "value"), budget, _text(fields, "unit", ""))


def _null(item: JSON) -> NullCandidate:
    fields = _fields(item)
    rejected = fields.get("rejected")
    if not isinstance(rejected, bool):
        raise ValueError(f"rejected is {rejected!r}; allowed are true and false")
    return NullCandidate(_text(fields, "kind"), rejected, _text(fields, "detail", ""))


def _fields(value: JSON) -> Fields:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} stands where only a mapping is allowed")
    return value


def _text(fields: Fields, key: str, default: str | None = None) -> str:
    value = fields.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}; allowed is a text")
    return value


def _number(fields: Fields, key: str, default: float | None = None) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} is {value!r}; allowed is a number")
    return float(value)


def _items(fields: Fields, key: str, read: Callable[[JSON], T]) -> tuple[T, ...]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} is {value!r}; allowed is a list")
    return tuple(read(item) for item in value)
