"""What has come back of each shard, in `OUT/shards/NAME/`: its record as it grows, its log, how it ended.

A shard's folder looks like the folder of a command that ran here: `v32 report OUT/shards/NAME` reads it.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reports.records import JSON, RUN_FILE, RecordError, Run, read_run, why_not_complete, write_text_atomically

from .local import LOG_FILE, ran_out_of_memory
from .shards import End, Piece, Shard

SHARDS, PLAN_FILE, END_FILE = "shards", "plan.json", "end.json"


@dataclass(frozen=True, slots=True)
class Kept:
    """The folder of a run in which shards are kept."""

    out: Path

    def folder(self, shard: Shard) -> Path:
        """Where a shard's record, log and end are."""
        return self.out / SHARDS / shard.name

    def begin(self, shards: Sequence[Shard], code: str, name: str, resume: bool) -> str:
        """Make the folder ready, and return the run's name; with `resume` what is whole, of the same command and code stays.

        Raises:
            OSError: the folder cannot be written.
        """
        plan = self._plan() if resume else {}
        same_code = plan.get("code") == code
        for shard in shards:
            known = same_code and plan["shards"].get(shard.name) == shard.identity
            if not (known and self.whole(shard)):
                shutil.rmtree(self.folder(shard), ignore_errors=True)
        if not resume:
            shutil.rmtree(self.out / SHARDS, ignore_errors=True)
        # Under the same name a command that can go on finds what it left on the Volume; another code starts anew there.
        name = plan["name"] if same_code else name
        text = {"name": name, "code": code, "shards": {shard.name: shard.identity for shard in shards}}
        write_text_atomically(self.out / SHARDS / PLAN_FILE, json.dumps(text, indent=1) + "\n")
        return name

    def _plan(self) -> dict[str, JSON]:
        try:
            found = json.loads((self.out / SHARDS / PLAN_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) and {"name", "code", "shards"} <= found.keys() else {}

    def add(self, shard: Shard, piece: Piece) -> None:
        """Append to a shard's record; a piece that begins at 0 begins the record anew."""
        path = self.folder(shard) / RUN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        # A container that took over may resend a part: what does not continue the file is left to the end's whole record.
        if piece.at in (0, size):
            with path.open("ab" if piece.at else "wb") as file:
                file.write(piece.text.encode("utf-8"))

    def finish(self, shard: Shard, end: End) -> End:
        """Keep a shard's end, and return it with its problem, if its record shows one that the command did not."""
        folder = self.folder(shard)
        if end.record is not None:
            write_text_atomically(folder / RUN_FILE, end.record)
        if not end.problem and (trouble := _trouble(folder)):
            cause = "it ran out of memory, and " if ran_out_of_memory(end.log) else ""
            end = replace(end, problem=cause + trouble)
        write_text_atomically(folder / LOG_FILE, end.log)
        write_text_atomically(folder / END_FILE, end.to_json() + "\n")
        return end

    def ended(self, shard: Shard) -> End | None:
        """How a shard ended, None when it has not."""
        try:
            return End.from_json((self.folder(shard) / END_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def whole(self, shard: Shard) -> bool:
        """Whether a shard came to its own end and all of its record is here."""
        end = self.ended(shard)
        return end is not None and not end.problem and not _trouble(self.folder(shard))

    def record(self, shard: Shard) -> Run | None:
        """What can be read of a shard's record; None when there is none."""
        try:
            return read_run(self.folder(shard))
        except RecordError:
            return None


def _trouble(folder: Path) -> str:
    try:
        run = read_run(folder)
    except RecordError as error:
        return f"it left no record: {error}" if (folder / RUN_FILE).exists() else "it left no record"
    return f"its {why_not_complete(run)}" if not run.complete else ""
