"""What crosses between `v32 kernels` and its worker processes. Nothing here imports Triton until a worker has started.

Triton decides when it is imported whether kernels are interpreted or compiled, so every process compiles only after
`start` has set its environment.
"""

import os
from dataclasses import dataclass

from .budgets import Measured


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel for one target, by names, so that any process can find it, and what its budget follows from."""

    module: str
    kernel: str
    target: str
    num_warps: int
    tensor_cores: bool
    shared_memory: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All jobs, the modules that could not be asked for theirs with the reason, and the compilers by target."""

    jobs: tuple[Job, ...]
    problems: dict[str, str]
    toolchains: dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured; where that is None, why there is nothing to measure, in one line and in full."""

    measured: Measured | None
    seconds: float
    problem: str = ""
    details: str = ""


def start() -> None:
    """Sets the environment of a worker, before anything of it imports Triton."""
    os.environ.pop("TRITON_INTERPRET", None)
    # Multiplications and additions become one instruction, which is what a GPU runs where nothing is set with
    # Triton 3.9; the next version has another default, and then the registers would be those of other code.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def list_jobs(modules: tuple[str, ...], targets: tuple[str, ...]) -> Listing:
    """The jobs of `modules` for `targets`; without modules, those of every module of `optimized.kernels`.

    Raises:
        RuntimeError: Triton's own tools are missing.
    """
    from . import compiling

    return compiling.list_jobs(modules, targets)


def run_job(job: Job) -> Outcome:
    """Compile and measure one kernel for one target."""
    from . import compiling

    return compiling.run_job(job)
