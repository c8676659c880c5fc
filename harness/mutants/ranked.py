"""Mutants that need several ranks: they are compared with one process, on two gloo ranks of this machine.

What is compared stands in the matrix as the checks `ranks.…`. In fp64 another order of a sum is worth some 1e-16, so that
whatever lies beyond `EXACT` is a fault.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from reports.schema import Status

from ..ranks.parity import EXACT
from ..ranks.world import run_world
from ..ranks.wrong import RIGHT, short
from .mutant import Mutant

FOLDER = "optimized/distributed/"
RANKS = 2
COMPARED = (
    "loss", "lm loss", "kl loss", "logits", "scores", "targets", "selections", "experts", "norm", "gradients",
)  # fmt: skip
CHECKS = tuple(f"ranks.{what.replace(' ', '_')}" for what in COMPARED)


def needs_ranks(mutant: Mutant) -> bool:
    """Whether a mutant is in code that one process never runs."""
    return any(patch.file.startswith(FOLDER) for patch in mutant.patches)


def judged(measures: dict[str, float]) -> tuple[dict[str, Status], dict[str, str]]:
    """The status of each comparison, and why it failed."""
    statuses, reasons = {}, {}
    for what, check in zip(COMPARED, CHECKS, strict=True):
        # A NaN is no agreement.
        agrees = measures[what] <= EXACT
        statuses[check] = Status.VERIFIED if agrees else Status.FAILED
        if not agrees:
            reasons[check] = f"{what} of {RANKS} ranks is off by {measures[what]:.3g}; {EXACT:.0e} is allowed"
    return statuses, reasons


def compared(names: list[str]) -> dict[str, dict[str, float]]:
    """What two ranks say of the mutants called `names`, by name, and of the copy without a patch, as "".

    Raises:
        AssertionError: a rank failed, with its traceback.
    """
    with TemporaryDirectory() as folder:
        found = run_world(RANKS, Path(folder) / "found.json", "harness.ranks.wrong", *map(short, names))
    return {"": found[RIGHT]} | {name: found[short(name)] for name in names}
