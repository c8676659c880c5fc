"""All layouts of a number of ranks, each with its memory and work, those that fit before those that do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from optimized.distributed.layout import SIZES, ParallelLayout

from .hardware import Cluster
from .memory import Memory, memory
from .step import Step
from .work import Work, work

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout. `why` says in a sentence why it does not fit, and is empty where it does; one that cannot run at all has
    neither memory nor work."""

    layout: ParallelLayout
    why: str = ""
    memory: Memory | None = None
    work: Work | None = None
    tokens: int = 0

    @property
    def name(self) -> str:
        """As `--parallel` takes it."""
        return ",".join(f"{axis}={getattr(self.layout, axis)}" for axis in SIZES)

    @property
    def tokens_a_second(self) -> float:
        """Of all ranks, at the floor."""
        return self.tokens / self.work.floor if self.work is not None else 0.0


def every_layout(world: int) -> Iterator[ParallelLayout]:
    """dp × cp × ep × tp = `world`, in every way."""

    def divisors(number: int) -> list[int]:
        return [d for d in range(1, number + 1) if number % d == 0]

    for tp in divisors(world):
        for ep in divisors(world // tp):
            for cp in divisors(world // tp // ep):
                yield ParallelLayout(dp=world // tp // ep // cp, cp=cp, ep=ep, tp=tp)


def candidate(step: Step, layout: ParallelLayout, cluster: Cluster, headroom: float) -> Candidate:
    """What `layout` takes; `headroom` is the share of a GPU's memory that is to stay free."""
    try:
        layout.check(step.config, cluster.count)
    except ValueError as error:
        return Candidate(layout, str(error))
    if layout.cp > step.length:
        return Candidate(layout, f"cp is {layout.cp}, but a sequence has {step.length} tokens to divide.")
    own = replace(step, layout=layout)
    taken, room = memory(own), cluster.gpu.memory * (1 - headroom)
    why = ""
    if taken.total > room:
        why = f"A rank needs {taken.total / GIB:.1f} GiB, {_largest(taken)}; {room / GIB:.1f} GiB are there."
    tokens = step.length * step.batch * layout.batches
    return Candidate(layout, why, taken, work(own, cluster), tokens)


def _largest(taken: Memory) -> str:
    parts = {
        "weights": taken.weights, "optimizer state": taken.optimizer, "activations": taken.kept,
        "work of one layer": taken.workspace, "communication": taken.communication,
    }  # fmt: skip
    name, size = max(parts.items(), key=lambda item: item[1])
    return f"most of all {size / GIB:.1f} GiB for {name}"


def ranked(step: Step, cluster: Cluster, headroom: float, fixed: ParallelLayout | None = None) -> list[Candidate]:
    """Every layout, or the one that is fixed: those that fit by tokens a second, then others by what they need."""
    layouts = [fixed] if fixed is not None else every_layout(cluster.count)
    found = [candidate(step, layout, cluster, headroom) for layout in layouts]

    def order(one: Candidate) -> tuple[int, float, float]:
        needs = 0.0 if one.memory is None else float(one.memory.total)
        if not one.why:
            return 0, -one.tokens_a_second, needs
        return 1 if one.memory is not None else 2, needs, 0.0

    return sorted(found, key=order)
