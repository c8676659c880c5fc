"""A stand-in for `v32`, light and ill-behaved on demand: `python -m suites.modal.command BEHAVIOUR --out DIR`.

It writes a record as our commands do, and then does what its behaviour says. `once-` in front: only the first time.
"""

import os
import signal
import sys
import time
from pathlib import Path

from harness.dispatch.local import CUT
from harness.environment import gpus
from reports.records import RUN_FILE, RunWriter, Status, Verdict, read_run, run_exit_code
from reports.schema import Measure

SECRET_VARIABLE = "HF_TOKEN"


def verdict(name: str, status: Status = Status.VERIFIED, reason: str = "") -> Verdict:
    """A verdict with little in it."""
    measures = (Measure("error", 0.5, 1.0),)
    return Verdict(name, "stand-in", "optimized", "text", status, "float32", "cpu", reason, measures)


def container() -> int:
    """The process of the container's runtime, whose child this is."""
    return os.getppid()


def misbehave(behaviour: str, out: Path) -> None:
    """Do what no command should, in the middle of a record."""
    if behaviour == "die":
        os.kill(container(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    elif behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "exhaust":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.31 TiB.", flush=True)
        os._exit(1)
    elif behaviour == "cut":
        print(f"--checkpoint is 'acme/model', and {CUT} or never came: the peer closed the connection.", flush=True)
        os._exit(2)
    elif behaviour == "hang":
        time.sleep(600)
    elif behaviour == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    elif behaviour == "garbage":
        with (out / RUN_FILE).open("a") as file:
            file.write("<html>502 Bad Gateway</html>\n")
    elif behaviour.startswith("meet"):
        # Three of these only ever end when they run together.
        give_up = time.monotonic() + 60
        while len(list(out.parent.glob("meet*/tried"))) < 3:
            if time.monotonic() > give_up:
                os._exit(8)
            time.sleep(0.1)
    elif behaviour == "cuda":
        print("CUDA error: an illegal memory access was encountered", flush=True)
    elif behaviour == "tell":
        print(f"the token is {os.environ.get(SECRET_VARIABLE, 'not here')}", flush=True)
        os._exit(7)


def main(behaviour: str, out: Path) -> int:
    """Write a record, misbehave, and end as a command of ours would."""
    out.mkdir(parents=True, exist_ok=True)
    mark = out / "tried"
    first = not mark.exists()
    mark.touch()
    header = {"subject": "optimized", "config": "tiny", "device": "cpu", "environment": {"gpu": gpus()}}
    with RunWriter(out / RUN_FILE, header) as writer:
        writer.write(verdict(f"{behaviour}.first"))
        print(f"{behaviour} has begun", flush=True)
        time.sleep(0.5)
        if not behaviour.startswith("once-") or first:
            misbehave(behaviour.removeprefix("once-"), out)
        if behaviour == "fail":
            writer.write(verdict("fail.second", Status.FAILED, "an error of 0.5 is too much"))
        writer.write(verdict(f"{behaviour}.last"))
        if behaviour == "slower":
            writer.verified_code = 4
    return run_exit_code(read_run(out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[3])))
