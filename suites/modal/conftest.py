"""What the loopback tests share: a server, and commands against it as a user would type them."""

import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.dispatch.local import hears_ctrl_c

from .loopback import Loopback

ROOT = Path(__file__).resolve().parents[2]
# The whole of a run, on a machine that does other things too.
PATIENCE = 170
# Drawn, because this file is uploaded too.
TOKEN = f"hf_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Ended:
    """A client that has ended."""

    code: int
    text: str


def start(server: Loopback, *words: str, program: str = "modal", **variables: str) -> subprocess.Popen:
    """A program of this environment with `words`, against the server, in a process of its own."""
    environment = {**os.environ, **server.client_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "COLUMNS": "200", "HF_TOKEN": TOKEN, **variables}  # fmt: skip
    return subprocess.Popen(
        [Path(sys.executable).with_name(program), *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=hears_ctrl_c,
    )  # fmt: skip


def run(server: Loopback, *words: str, program: str = "modal", patience: float = PATIENCE, **variables: str) -> Ended:
    """The same, to its end."""
    client = start(server, *words, program=program, **variables)
    try:
        text, _ = client.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(client.pid, signal.SIGKILL)
        text, _ = client.communicate()
        pytest.fail(
            f"{program} {' '.join(words)} did not end in {patience:g} s; it said:\n{text}\n{''.join(server.logs)}"
        )
    return Ended(client.returncode, text)


def until(condition, seconds: float = PATIENCE):
    """Wait for a condition; fails when it does not come."""
    give_up = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up, "What was waited for did not come."
        time.sleep(0.1)
    return found
