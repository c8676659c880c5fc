"""Floors that a run of `v32 bench` is held to with --floors: each with the setting it belongs to, and its source.

A floor is judged on medians of at least three paired samples. Times are compared as a share of the peer's, so that
every floor reads "at most".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from reports.schema import Measure, NullCandidate, Status, Verdict
from reports.timings import FAMILY

from .fits import doublings
from .paired import LEAST_SAMPLES, Series
from .point import FORWARD, TRAINING, WARM_UP
from .subjects import DENSE_FLASH, TRANSFORMERS

Kind = Literal["faster", "peak", "share of peak", "peak per doubling"]
# (contestant, pass, length) -> quantity -> median.
Medians = Mapping[tuple[str, str, int], Mapping[str, float]]
# The shortest length of which a doubling is judged: at 512 tokens the bench preset attends by another path (masked MHA),
# whose buffers are of another size.
SHORTEST_DOUBLED = 1024
# How far beyond a floor the null candidate lies.
_BEYOND = 1.01


@dataclass(frozen=True, slots=True)
class Target:
    """One floor. `limit`: times faster than `peer`; MiB; a share of the peer's MiB; or times the MiB of half the length.

    `overrides` and `batch` are the --set and --batch that it holds for, all in fp32 on one CPU thread; `length` is None
    where it holds for all lengths together.
    """

    kind: Kind
    pass_: str
    limit: float
    length: int | None = None
    peer: str = ""
    config: str = "bench"
    overrides: tuple[tuple[str, object], ...] = ()
    batch: int = 1
    source: str = ""

    @property
    def claim(self) -> str:
        """The floor in words."""
        at = "" if self.length is None else f" at L {self.length}"
        words = {
            "faster": f"{self.limit:g} times as fast as {self.peer}",
            "peak": f"peak growth of at most {self.limit:g} MiB",
            "share of peak": f"peak growth of at most {self.limit:g} of {self.peer}'s",
            "peak per doubling": f"peak growth of at most {self.limit:g} times that of half the length",
        }
        return f"{self.pass_}{at}: {words[self.kind]}"


_WIDE = (("index_head_dim", 128), ("index_n_heads", 64))
_REACHED = "a prototype of chunked torch operators reached {}"
_WIDTH = "the indexer at its true width, where a score of every head is what costs"
TARGETS: tuple[Target, ...] = (
    Target("faster", FORWARD, 1.5, 512, TRANSFORMERS, source=_REACHED.format("2.5 times")),
    Target("faster", TRAINING, 1.1, 512, TRANSFORMERS, source=_REACHED.format("1.4 times")),
    Target("faster", FORWARD, 5.0, 2048, TRANSFORMERS, source=_REACHED.format("6.8 times")),
    Target("faster", TRAINING, 3.0, 2048, TRANSFORMERS, source=_REACHED.format("3.5 times")),
    Target("faster", FORWARD, 12.0, 8192, TRANSFORMERS, source=_REACHED.format("18 times")),
    Target("faster", TRAINING, 12.0, 8192, TRANSFORMERS, source=_REACHED.format("19 times")),
    Target("faster", FORWARD, 1.0, 8192, DENSE_FLASH, source=_REACHED.format("1.2 times")),
    Target("faster", TRAINING, 1.5, 8192, DENSE_FLASH, source=_REACHED.format("1.7 times")),
    Target("peak", FORWARD, 300.0, 8192, source=_REACHED.format("190 MiB")),
    Target("peak", TRAINING, 1300.0, 8192, source=_REACHED.format("1030 MiB")),
    Target("peak per doubling", FORWARD, 2.3, source="linear in L is 2, L x L would be 4"),
    Target("peak per doubling", TRAINING, 2.3, source="linear in L is 2, L x L would be 4"),
    Target("faster", FORWARD, 5.0, 2048, TRANSFORMERS, overrides=_WIDE, batch=2, source=_WIDTH),
    Target("share of peak", FORWARD, 0.05, 2048, TRANSFORMERS, overrides=_WIDE, batch=2, source=_WIDTH),
    Target("peak", WARM_UP, 2048.0, 32768, source="no tensor of L x L: one of them would take 4096 MiB"),
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A floor and what was measured: `measure` is within its budget where the floor holds."""

    target: Target
    measure: Measure
    text: str

    @property
    def met(self) -> bool:
        """Whether the floor holds."""
        return self.measure.within


def applicable(
    config: str,
    overrides: Mapping[str, object],
    batch: int,
    passes: Iterable[str],
    lengths: Iterable[int],
    peers: Iterable[str],
    *,
    plain: bool,
) -> list[Target]:
    """The floors that hold for a request; `plain`: fp32, on a CPU, one thread."""
    given, passes, lengths, peers = tuple(sorted(overrides.items())), set(passes), sorted(lengths), set(peers)
    doubled = [n for n in lengths if n >= SHORTEST_DOUBLED and 2 * n in lengths]
    return [
        target
        for target in TARGETS
        if plain
        and (target.config, target.overrides, target.batch) == (config, given, batch)
        and target.pass_ in passes
        and (target.length in lengths if target.length is not None else bool(doubled))
        and (not target.peer or target.peer in peers)
    ]


def medians_of(series: Iterable[Series]) -> dict[tuple[str, str, int], dict[str, float]]:
    """The medians of every point that has the least number of samples."""
    return {
        (s.point.contestant, s.point.pass_, s.point.length): {
            quantity: s.middle(quantity) for quantity in ("seconds", "wall", "peak_mib")
        }
        for s in series
        if s.count >= LEAST_SAMPLES and "peak_mib" in s.samples
    }


def judge(target: Target, subject: str, medians: Medians) -> Judged | None:
    """A floor against what was measured; None where a point of it is missing."""
    if target.kind == "peak per doubling":
        found = doublings(_peaks(medians, subject, target.pass_), SHORTEST_DOUBLED)
        if not found:
            return None
        at, worst = max(found.items(), key=lambda item: item[1])
        measure = Measure("peak growth over that of half the length", worst, target.limit)
        return Judged(target, measure, f"{worst:.3g} times from L {at} to {2 * at}")
    assert target.length is not None
    own = medians.get((subject, target.pass_, target.length))
    if own is None:
        return None
    if target.kind == "peak":
        measure = Measure("peak growth", own["peak_mib"], target.limit, "MiB")
        return Judged(target, measure, f"{own['peak_mib']:.4g} MiB")
    peer = medians.get((target.peer, target.pass_, target.length))
    if peer is None:
        return None
    if target.kind == "faster":
        share = own["seconds"] / peer["seconds"]
        return Judged(
            target, Measure(f"time over that of {target.peer}", share, 1 / target.limit), f"{1 / share:.3g} times"
        )
    share = own["peak_mib"] / peer["peak_mib"] if peer["peak_mib"] else float("inf")
    return Judged(target, Measure(f"peak growth over that of {target.peer}", share, target.limit), f"{share:.3g}")


def _peaks(medians: Medians, subject: str, pass_: str) -> dict[int, float]:
    return {n: m["peak_mib"] for (who, p, n), m in medians.items() if (who, p) == (subject, pass_)}


def floor_verdict(target: Target, subject: str, medians: Medians, device: str, reproduce: str) -> Verdict:
    """A floor as a verdict: verified, failed, or skipped where its points were not measured."""
    judged = judge(target, subject, medians)
    blank = Verdict(
        check=f"{FAMILY}.floor",
        family=FAMILY,
        subject=subject,
        case=target.claim,
        status=Status.SKIPPED,
        dtype="float32",
        device=device,
        reason="its points were not measured",
        reproduce=reproduce,
    )
    if judged is None:
        return blank
    missed = judge(target, subject, _beyond(target, subject, medians, judged))
    nulls = (NullCandidate("1 % beyond the floor", missed is not None and not missed.met),)
    held = Status.VERIFIED if nulls[0].rejected else Status.VACUOUS
    status = held if judged.met else Status.FAILED
    return replace(blank, status=status, reason=judged.text, measures=(judged.measure,), nulls=nulls)


def _beyond(target: Target, subject: str, medians: Medians, judged: Judged) -> Medians:
    """The medians with the subject's so much worse that the floor is missed by one per cent."""
    peaks = _peaks(medians, subject, target.pass_)
    length, value = target.length, judged.measure.value
    if length is None:
        last = max(doublings(peaks, SHORTEST_DOUBLED))
        length, value = 2 * last, peaks[2 * last] / peaks[last]
    assert judged.measure.budget is not None
    key = (subject, target.pass_, length)
    factor = _BEYOND * judged.measure.budget / value if value > 0 else float("inf")
    return {**medians, key: {quantity: number * factor for quantity, number in medians[key].items()}}
