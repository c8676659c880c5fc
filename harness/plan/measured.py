"""The share of a GPU's rate that `v32 bench` has measured on that GPU: what a floor is divided by, never a guess."""

from dataclasses import dataclass
from pathlib import Path

from reports.records import Run, read_run
from reports.timings import timings
from reports.view import flat

from ..bench.point import TRAINING, WARM_UP
from .hardware import Gpu


@dataclass(frozen=True, slots=True)
class Fraction:
    """share: of the data sheet's rate, at the longest length measured; `on` says what was measured, and where."""

    share: float
    on: str


def fraction(path: Path, gpu: Gpu, dtype: str, *, warm_up: bool) -> Fraction | str:
    """The share that a record of `v32 bench` holds for this GPU and dtype, or the sentence that says why it holds none.

    Raises:
        RecordError: not a record.
    """
    run = read_run(path)
    device = _gpu_name(run)
    if gpu.name.split("-")[0] not in device.replace("-", " ").split():
        return (
            f"The record {path} was measured on {device or 'no GPU'}, not on {gpu.name}: it tells nothing of this step."
        )
    if run.header.get("dtypes") != [dtype]:
        return f"The record {path} was measured in {flat(run.header.get('dtypes'))}, not in {dtype}: it tells nothing of this step."
    wanted, found = WARM_UP if warm_up else TRAINING, timings(run)
    rows = [
        row for row in (found.rows if found is not None else ())
        if found is not None and row.contestant == found.subject and row.pass_ == wanted and row.flop and row.middle("seconds")
    ]  # fmt: skip
    if not rows:
        return f"The record {path} holds no time of the pass {wanted}, of which this step is one."
    last = max(rows, key=lambda row: row.length)
    seconds, flop = last.middle("seconds"), last.flop
    assert seconds is not None and flop is not None
    share = flop / seconds / gpu.flops
    return Fraction(share, f"{wanted} of {run.header.get('config')} at {last.length} tokens in {dtype} on {device}")


def _gpu_name(run: Run) -> str:
    environment = run.header.get("environment")
    found = environment.get("gpu") if isinstance(environment, dict) else None
    return flat(found) if found else ""
