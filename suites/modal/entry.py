"""An entry like `suites/gpu.py`, whose shards are stand-ins: `modal run -m suites.modal.entry --behaviours fine,die`."""

import sys
from pathlib import Path

from rich.console import Console

from harness.dispatch.command import dispatch, settings_for
from harness.dispatch.modal import cloud_for
from harness.dispatch.shards import Shard
from suites.gpu import early

GPU, TIMEOUT = early(sys.argv[1:])
settings = settings_for(GPU, TIMEOUT, None, False, None, "stand-in")
cloud = cloud_for(settings.gpu, settings.timeout)
app = cloud.app


@app.local_entrypoint()
def main(behaviours: str, out: str, gpu: str = GPU, timeout: float = 3600, price: float = 0.0, resume: bool = False):
    """Run a shard for each of `behaviours`, separated by commas."""
    asked = settings_for(gpu, timeout, price or None, resume, Path(out), "stand-in")
    shards = [
        Shard(name, "stand-in", (name,), module="suites.modal.command", on_gpu=bool(asked.gpu))
        for name in behaviours.split(",")
    ]
    sys.exit(dispatch(shards, asked, cloud.place, Console()))
