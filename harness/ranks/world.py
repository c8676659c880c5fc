"""A world of gloo ranks on this machine: forked from one process that has imported torch, so that the import is paid once.

    python -m harness.ranks.world RANKS OUT MODULE [ARGUMENT …]

calls `MODULE.on_rank(rank, prepared, arguments)` on every rank, where `prepared` is what `MODULE.prepare(arguments)`
returned before the fork. What rank 0 returns is written to OUT as JSON. The exit code is that of the first rank that
failed, and its traceback is on stderr.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Seconds after which a rank that waits for another gives up.
PATIENCE = 300


def run_world(ranks: int, out: Path, module: str, *arguments: str, timeout: float = 600) -> dict[str, Any]:
    """What rank 0 answers; raises where a rank failed."""
    command = [sys.executable, "-m", "harness.ranks.world", str(ranks), str(out), module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{ranks} ranks of {module}: exit code {done.returncode}\n{done.stderr[-6000:]}")
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _on_rank(rank: int, ranks: int, port: int, out: Path, module: Any, prepared: Any, arguments: list[str]) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE))
    answer = module.on_rank(rank, prepared, arguments)
    if rank == 0:
        out.write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Fork the ranks, wait for all; stop the others when one fails."""
    ranks, out, name, *arguments = sys.argv[1:]
    module = importlib.import_module(name)
    prepared = module.prepare(arguments)
    port = free_port()
    children = {}
    for rank in range(int(ranks)):
        if (child := os.fork()) == 0:
            code = 1
            try:
                _on_rank(rank, int(ranks), port, Path(out), module, prepared, arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children[child] = rank
    failed = 0
    while children:
        child, status = os.wait()
        children.pop(child)
        if (code := os.waitstatus_to_exitcode(status)) and not failed:
            failed = code if code > 0 else 128 - code
            # A moment for the others to say what they saw.
            time.sleep(1)
            for other in children:
                os.kill(other, 9)
    return failed


if __name__ == "__main__":
    sys.exit(main())
