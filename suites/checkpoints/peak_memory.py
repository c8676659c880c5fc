"""How much memory loading takes at its peak: `python -m suites.checkpoints.peak_memory DIRECTORY`.

Prints three numbers of bytes: the size of the model, what the process grew by until its peak while that was loaded,
and what it grew by when it was loaded in a way that must be noticed: every tensor is read before the first is placed.
"""

import sys
from pathlib import Path
from typing import Any

import torch

import reference
from reference import streaming


def peak_bytes() -> int:
    """The most memory that this process has had at once, without its parent's, which getrusage counts in."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def gather(streamed: Any) -> Any:
    """`streamed_parameters` that keeps what it reads."""

    def gathered(checkpoint: Any, *rest: Any) -> Any:
        kept = {name: stored.read() for name, stored in checkpoint.tensors.items()}
        parameters = streamed(checkpoint, *rest)
        next(iter(parameters.values())).kept = kept
        return parameters

    return gathered


def loaded_bytes(directory: Path) -> int:
    """The size of the model in `directory`, which is loaded and let go."""
    model = reference.load_model_for_sft(directory)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    return sum(t.nbytes for t in model.state_dict().values())


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    # First the small checkpoint, which brings in everything that is imported late.
    loaded_bytes(directory / "small")
    before = peak_bytes()
    size = loaded_bytes(directory / "large")
    streamed = peak_bytes() - before
    streaming.streamed_parameters = gather(streaming.streamed_parameters)
    loaded_bytes(directory / "large")
    print(size, streamed, peak_bytes() - before)
