"""`v32 train` on one rank of a world, from fields of its request as JSON: what torchrun starts in the tests.

    torchrun --nproc-per-node 2 -m suites.distributed.launch '{"stage": "sparse", "parallel": "fsdp=2", "out": "…"}'

With `"killed": {"rank": 1, "step": 3}` that rank kills itself before that step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from harness.training import command, loop


def kill_at(rank: int, step: int) -> None:
    """Have this process, if it is `rank`, killed as the kernel would kill it: no exit handler runs."""
    whole = loop._step

    def stepped(run: Any, number: int) -> Any:
        if number == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(run, number)

    loop._step = stepped


def main() -> int:
    """The exit code of `v32 train`."""
    fields = json.loads(sys.argv[1])
    if killed := fields.pop("killed", None):
        kill_at(**killed)
    return command.run_training(command.Request(**{**fields, "out": Path(fields["out"])}), Console())


if __name__ == "__main__":
    sys.exit(main())
