"""The other end of a worker: starts it, asks it, and turns every way in which it can end into one sentence."""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from typing import Any

from ..environment import ROOT
from .point import Point

# What a worker is started with.
COMMAND = (sys.executable, "-m", "harness.bench.worker")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Lines of a worker's error output that a report shows.
_TAIL = 12


class WorkerError(Exception):
    """A worker that gave no answer; `detail` is its traceback, or the end of what it wrote to its error output."""

    def __init__(self, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail


class Worker:
    """A process of its own for one point, alive until `close`; when its model stands it only waits to be asked.

    It is started in a session of its own: Ctrl-C reaches this process alone, which then decides.
    """

    def __init__(self, point: Point, timeout: float) -> None:
        self.point, self.timeout = point, timeout
        threads = dict.fromkeys(_THREADS, str(point.threads))
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        # A worker that waits must not spin beside the one that works.
        environment = {**os.environ, **threads, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )
        self._say(point.to_json())

    @cached_property
    def ready(self) -> dict[str, Any]:
        """What it answers when its model stands and is warm; it builds while nobody asks.

        Raises:
            WorkerError: no answer, in one sentence.
        """
        return self._answer()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def run(self) -> dict[str, float]:
        """One pass.

        Raises:
            WorkerError: no answer, in one sentence.
        """
        assert self.ready is not None
        self._say("run")
        return self._answer()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            # Closing flushes what the dead process never read.
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # The answer, or that there is none, tells why.
            return

    def _answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise WorkerError(str(answer["error"]), str(answer.get("traceback", "")))
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"it gave no answer within {self.timeout:g} s (--timeout) and was ended")
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    raise WorkerError(self._why_it_ended(), self._tail())
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"its process ended with exit code {code}"
        name = signal.Signals(-code).name
        out_of_memory = ": out of memory, most likely" if -code == signal.SIGKILL else ""
        return f"its process was killed by {name}{out_of_memory}"

    def _tail(self) -> str:
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").splitlines()[-_TAIL:])
