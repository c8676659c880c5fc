"""Writes the file of a run while it runs, so that it can be read after any kind of end."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Self

from reports.interrupts import interruptions, stop_if_interrupted
from reports.schema import (
    SCHEMA_VERSION,
    Measurement,
    RecordError,
    Status,
    Verdict,
    count_statuses,
    exit_code,
)
from reports.strict_json import JSON, dumps


class RunWriter:
    """Writes a run's file as the run goes: `with RunWriter(path, header) as writer: writer.write(verdict)`.

    Every line is one write call, so that a killed process leaves at most one cut last line. An older file at
    `path` is replaced as a whole when the header is written. `sync=True` also survives a power cut.
    After a Ctrl-C inside the block nothing is recorded but the footer, and KeyboardInterrupt leaves the block, whatever
    had become of it underneath (`reports.interrupts`).
    `verified_code` is the exit code when all is verified: set it to 4 where a baseline was not reached.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, object], *, sync: bool = False) -> None:
        for key in ("record", "schema"):
            if key in header:
                raise RecordError(f"header has the key {key}, which the writer sets; allowed are other keys.")
        self.path = Path(path)
        self.verified_code = 0
        self._header = dict(header)
        self._sync = sync
        self._file = -1
        self._size = 0
        self._started = 0.0
        self._interruptions = 0
        self._statuses: list[Status] = []

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        self._size = 0
        self._interruptions = interruptions()
        self._statuses.clear()
        self._file, temporary = _open_beside(self.path)
        try:
            self._append({"record": "header", "schema": SCHEMA_VERSION, **self._header})
            os.replace(temporary, self.path)
        except BaseException:
            self._close()
            temporary.unlink(missing_ok=True)
            raise
        return self

    def write(self, record: Verdict | Measurement) -> None:
        """Append a verdict or a measurement; one that cannot be written raises and leaves the file whole."""
        stop_if_interrupted(self._interruptions)
        line: dict[str, object] = {item.name: getattr(record, item.name) for item in fields(record)}
        if isinstance(record, Measurement):
            self._append({"record": "measurement", **line})
            return
        line["measures"] = [asdict(measure) for measure in record.measures]
        line["nulls"] = [asdict(null) for null in record.nulls]
        self._append({"record": "verdict", **line})
        self._statuses.append(record.status)

    def event(self, kind: str, /, **data: JSON) -> None:
        """Append an event: something worth a line that is neither a verdict nor a measurement."""
        stop_if_interrupted(self._interruptions)
        self._append({"record": "event", "kind": kind, "at": self._elapsed(), "data": data})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = interruptions() > self._interruptions and not isinstance(error, KeyboardInterrupt)
        if lost:
            kind, error = KeyboardInterrupt, KeyboardInterrupt()
        footer: dict[str, object] = {"record": "footer", "ended": "complete"}
        if kind is not None:
            footer["ended"] = "interrupted" if issubclass(kind, KeyboardInterrupt) else "error"
            footer["reason"] = f"{kind.__name__}: {error}" if str(error) else kind.__name__
        footer["counts"] = count_statuses(self._statuses)
        footer["seconds"] = self._elapsed()
        code = exit_code(self._statuses)
        footer["exit_code"] = code or (self.verified_code if kind is None else 3)
        try:
            self._append(footer)
        finally:
            self._close()
        if lost:
            raise KeyboardInterrupt

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._started, 3)

    def _append(self, fields: Mapping[str, object]) -> None:
        if self._file < 0:
            raise RecordError(f"RunWriter for {self.path.name} is not open; allowed are writes in its with block.")
        try:
            line = (dumps(fields) + "\n").encode("ascii")
        except ValueError as error:
            raise RecordError(f"A {fields['record']} cannot be written: {error}") from None
        try:
            written = os.write(self._file, line)
            # A full disk takes part of a line and refuses the rest only at the next call.
            while written < len(line):
                written += os.write(self._file, line[written:])
            if self._sync:
                os.fsync(self._file)
            self._size += len(line)
        except BaseException:
            os.ftruncate(self._file, self._size)
            raise

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = _open_beside(target)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _open_beside(path: Path) -> tuple[int, Path]:
    # Not tempfile: its files are private to the user, and these stay.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666), temporary
