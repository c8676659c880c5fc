"""Runs one shard in a process of its own and gives back its record while it is written: here, or inside a container."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from reports.records import RUN_FILE

from ..environment import ROOT
from .shards import End, Items, Piece, Shard

LOG_FILE = "log.txt"
# The end of a log that is sent back.
LOG_BYTES = 32_000
# How often a record is looked at, and how long a command that is told to stop may take to write its last lines.
EVERY, GRACE = 0.2, 10.0
# Variables whose values a log must not show.
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")
# What a command of ours may end with and have done its work: verified, failed, an error on record, slower.
DONE = (0, 1, 3, 4)
USAGE_ERROR = 2
# What a command says last whose download the network ended: no fault of it, and whole files stay for the next attempt.
CUT = "the hub's answer was cut"
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "Cannot allocate memory", "MemoryError")


def run_shard(shard: Shard, out: Path, limit: float) -> Items:
    """Run the shard's command for at most `limit` seconds; its record goes to `out`, its last item is an `End`."""
    out.mkdir(parents=True, exist_ok=True)
    if not shard.resumes:
        # An older record in the same place would be read as this one's beginning.
        (out / RUN_FILE).unlink(missing_ok=True)
    with TemporaryDirectory() as work:
        for name, text in shard.files:
            (Path(work) / name).write_text(text, encoding="utf-8")
        with (out / LOG_FILE).open("wb") as log:
            started = time.monotonic()
            child = subprocess.Popen(
                [sys.executable, "-m", *shard.launch, "--out", str(out)],
                cwd=work,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path()), "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own group, so that what it starts is stopped with it, and a Ctrl-C reaches it only through here.
                start_new_session=True,
                preexec_fn=hears_ctrl_c,
            )
            try:
                reader = _Reader(out / RUN_FILE)
                late = False
                while child.poll() is None:
                    yield from reader.news()
                    if time.monotonic() - started > limit:
                        late = True
                        _stop(child)
                        break
                    time.sleep(EVERY)
            finally:
                _stop(child)
        seconds = time.monotonic() - started
    yield from reader.news()
    text = log_tail(out / LOG_FILE)
    yield End(
        problem=_problem(child.returncode, text, limit if late else None),
        exit_code=child.returncode,
        seconds=round(seconds, 3),
        record=reader.whole(),
        log=text,
        infrastructure=not late and was_cut(child.returncode, text),
    )


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a process in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def log_tail(path: Path) -> str:
    """The end of a log, without the secrets that the environment holds."""
    text = path.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace")
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"<{name}>")
    return text


def ran_out_of_memory(log: str) -> bool:
    """Whether a log says so; the exit code of such a command is that of any other uncaught exception."""
    return any(words in log for words in OUT_OF_MEMORY)


def was_cut(code: int, log: str) -> bool:
    """Whether a command ended because the hub did not answer to the end."""
    return code != 0 and CUT in _last_line(log)


def _last_line(log: str) -> str:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it printed nothing")


def _import_path() -> list[str]:
    # The project first; what the container put there, such as Modal's own packages, stays.
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the command to end, so that its record gets its last line; then end it and all that it started."""
    if child.poll() is None:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _problem(code: int, log: str, limit: float | None) -> str:
    last = _last_line(log)
    if limit is not None:
        return f"it was stopped after {limit:g} s, its time limit"
    if was_cut(code, log):
        return f"its download was cut: {last}"
    if code in DONE:
        return ""
    if ran_out_of_memory(log):
        return f"it ran out of memory: {last}"
    if code < 0:
        name = signal.Signals(-code).name
        return f"it was killed by {name}" + (", as a process is when memory runs out" if name == "SIGKILL" else "")
    if code == USAGE_ERROR:
        return f"it refused its command: {last}"
    return f"it ended with the exit code {code}: {last}"


@dataclass(slots=True)
class _Reader:
    """Reads a record file that is being written, whole lines only; a file that took its place is read from its start."""

    path: Path
    at: int = 0
    inode: int = 0

    def news(self) -> Iterator[Piece]:
        """What has been added since the last call, if anything."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode:
                    self.inode, self.at = inode, 0
                file.seek(self.at)
                new = file.read()
        except FileNotFoundError:
            return
        new = new[: new.rfind(b"\n") + 1]
        if new:
            yield Piece(self.at, new.decode("utf-8", "replace"))
            self.at += len(new)

    def whole(self) -> str | None:
        """The file as it stands, None when there is none."""
        return self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else None
