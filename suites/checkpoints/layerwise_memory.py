"""How much memory a walk by layers takes at its peak: `python -m suites.checkpoints.layerwise_memory DIRECTORY`.

Prints bytes: what the process grew by until its peak while it walked 2 layers, then 8, then 8 in a way that must be
noticed, because every layer that was read is kept; then the peak of the process before that last walk, what `needs.py`
said that it would be, and the largest layer.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console

from harness.layerwise.command import Request, job_for, verify_layers
from harness.layerwise.layer import LayerFiles

from .peak_memory import peak_bytes


def keep(read, kept):
    """`LayerFiles.layer` that keeps what it reads."""

    def reads(files, index, x_BLM):
        kept.append(read(files, index, x_BLM))
        return kept[-1]

    return reads


def walk(directory: Path, layers: int, out: Path) -> None:
    """Walk some layers, and say nothing."""
    code = verify_layers(Request(str(directory), until=layers, batch=1, out=out), Console(quiet=True))
    assert code == 0, f"the walk ended with {code}"


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    torch.set_num_threads(1)
    # First a walk of a small checkpoint, which brings in everything that is imported late.
    walk(directory / "small", 2, directory / "out-small")
    before = peak_bytes()
    found = []
    for layers in (2, 8):
        walk(directory / "large", layers, directory / f"out-{layers}")
        found.append(peak_bytes() - before)
    peak = peak_bytes()
    LayerFiles.layer = keep(LayerFiles.layer, [])
    walk(directory / "large", 8, directory / "out-kept")
    found.append(peak_bytes() - before)
    needs = job_for(Request(str(directory / "large"), batch=1, out=directory / "none")).needs
    print(*found, peak, needs.host_bytes, needs.layer_bytes)
