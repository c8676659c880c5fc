"""Two runs side by side: what changed, and whether the second is slower or less accurate than the first.

Times and peaks: a point is worse when its samples differ by the exact test of Mann and Whitney (p < `SIGNIFICANT`, at
least `LEAST_SAMPLES` a side) and its median grew by at least `LEAST_EFFECT`; a peak also by `LEAST_MIB`. Machines drift: where both runs measured
the machine's own rate beside a point, its time must be as much worse in units of that rate too. On different hardware
times and peaks are shown, and not judged; on different inputs neither is accuracy.

Accuracy: the same seed gives the same inputs, so an error has no noise to be tested, and its effect alone is judged. A
check is less accurate when its worst case takes at least `ACCURACY_EFFECT` times the share of its budget that it took,
and `ACCURACY_SHARE` of the budget more; and when what was verified no longer is, also because it is not looked at any
more where the same was asked on the same hardware. Checks that the second run lacks altogether are named and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

from reports.budgets import CheckUse, check_uses
from reports.ranks import mann_whitney
from reports.records import JSON, RecordError, Run, Verdict, why_not_complete
from reports.schema import FAILING, Measurement, Status
from reports.text import number, percent
from reports.timings import QUANTITIES, point_of
from reports.view import flat

SIGNIFICANT, LEAST_SAMPLES, LEAST_EFFECT = 0.002, 7, 1.15
# Medians of seven equal runs (bench, 512 tokens) lie 3.1 MiB apart around 11: what an allocator keeps differs from one
# process to the next, and the samples of one process do not show it.
LEAST_MIB = 8.0
# On the same inputs two right backends (torch and native, tiny) take shares within 1.06 times of each other; on another
# length one share of 60 doubled. Below a tenth of a budget a share says nothing: derivatives go from 0.03 % to 3 %.
ACCURACY_EFFECT, ACCURACY_SHARE = 1.5, 0.1
# Quantities of which less is better, by the unit of a measurement that belongs to no point.
_LESS_IS_BETTER = ("s", "ms", "us", "µs", "MiB", "GiB")
_MACHINE = "machine"
_HARDWARE = ("cpu", "gpu", "memory_gib")
_MADE_BY = ("versions", "git", "torch", "variables", "os")
_INPUTS = ("config", "config_fields", "weights", "seed", "seq_len", "batch", "text", "bench.batch", "bench.threads")
_REQUEST = ("subject", "dtypes", "backend", "implementations", "bench")
# What a config holds that no model computes with.
_NOT_COMPUTED = ("config_fields.transformers_version", "config_fields._name_or_path", "config_fields.architectures")

Word = Literal["worse", "better", "equal", "not judged"]
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something under which the runs differ: `kind` is hardware, version, input or request."""

    kind: str
    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A verdict that both runs have, answered in two ways."""

    check: str
    subject: str
    case: str
    dtype: str
    before: Status
    after: Status
    reason: str
    # The same was asked of both runs, on the same hardware.
    alike: bool = True

    @property
    def word(self) -> Word:
        """Worse where what was verified is so no longer, also by not being looked at; better where what failed is."""
        if self.after in FAILING:
            return "equal" if self.before in FAILING else "worse"
        if self.before is Status.VERIFIED and self.alike:
            return "worse"
        return "better" if self.before in FAILING and self.after is Status.VERIFIED else "not judged"


@dataclass(frozen=True, slots=True)
class Drift:
    """A number of both runs: `before` and `after` in words, their ratio, and what is thought of it."""

    name: str
    before: str
    after: str
    ratio: float
    word: Word
    why: str
    p: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first run is the baseline."""

    differences: tuple[Difference, ...]
    statuses: tuple[StatusChange, ...]
    accuracy: tuple[Drift, ...]
    times: tuple[Drift, ...]
    missing: tuple[str, ...]
    new: tuple[str, ...]
    unfinished: tuple[str, ...]

    @property
    def worse(self) -> list[str]:
        """What is slower or less accurate, in words."""
        changed = [f"{c.check} on {c.case} is {c.after}" for c in self.statuses if c.word == "worse"]
        return changed + [
            f"{drift.name} {number(drift.ratio)}x" for drift in (*self.accuracy, *self.times) if drift.word == "worse"
        ]

    @property
    def exit_code(self) -> int:
        """4 with a regression; 3 where a run did not end or nothing could be judged, so that nobody knows; else 0."""
        return 4 if self.worse else 3 if self.unfinished or not self.judged else 0

    @property
    def judged(self) -> int:
        """How many numbers were judged."""
        return sum(drift.word != "not judged" for drift in (*self.accuracy, *self.times))

    def line(self, most: int = 5) -> str:
        """The comparison in one line."""
        compared = f"{len(self.accuracy)} accuracies · {len(self.times)} times and peaks"
        found = self.worse
        if found:
            more = f", and {len(found) - most} more" if len(found) > most else ""
            return f"{compared} — SLOWER OR LESS ACCURATE: {'; '.join(found[:most])}{more}"
        if self.unfinished:
            return f"{compared} — {'; '.join(self.unfinished)}: what is missing cannot be compared"
        if not self.judged:
            return f"{compared} — nothing could be judged: {self._why_not()}"
        words = [*(change.word for change in self.statuses), *(drift.word for drift in (*self.accuracy, *self.times))]
        better, unjudged = words.count("better"), words.count("not judged")
        tail = f", {better} better" if better else ""
        tail += f"; {unjudged} not judged" if unjudged else ""
        tail += f"; {len(self.missing)} missing from the second run" if self.missing else ""
        return f"{compared} — nothing is slower or less accurate{tail}"

    def _why_not(self) -> str:
        reasons = dict.fromkeys(drift.why for drift in (*self.accuracy, *self.times))
        return "; ".join(reasons) or "the runs have no number in common"


def compare(before: Run, after: Run) -> Comparison:
    """Compare two runs; `before` is the baseline.

    Raises:
        RecordError: they have no check and no measurement in common.
    """
    verdicts = _by_key(before.verdicts), _by_key(after.verdicts)
    samples = _samples(before), _samples(after)
    if not (set(verdicts[0]) & set(verdicts[1]) or set(samples[0]) & set(samples[1])):
        raise RecordError(
            "the runs have no check and no measurement in common; two runs of the same command can be compared."
        )
    differences = tuple(_differences(before, after))
    kinds = {difference.kind for difference in differences}
    bar = "the inputs differ" if "input" in kinds else ""
    keys = [*verdicts[0], *samples[0]], [*verdicts[1], *samples[1]]
    return Comparison(
        differences=differences,
        statuses=tuple(_changes(*verdicts, alike=not kinds & {"hardware", "input", "request"})),
        accuracy=tuple(_accuracy(before, after, bar)),
        times=tuple(_times(*samples, bar or ("the hardware differs" if "hardware" in kinds else ""), _judged_subject(after))),
        missing=tuple(_said(key) for key in keys[0] if key not in keys[1]),
        new=tuple(_said(key) for key in keys[1] if key not in keys[0]),
        unfinished=tuple(
            f"{name} {why}" for name, run in (("the first", before), ("the second", after)) if (why := why_not_complete(run))
        ),
    )  # fmt: skip


def _said(key: Key) -> str:
    return ", ".join(part for part in key if part)


def _differences(before: Run, after: Run) -> Iterator[Difference]:
    environments = [run.header.get("environment") for run in (before, after)]
    first, second = (environment if isinstance(environment, dict) else {} for environment in environments)
    for name in _HARDWARE:
        yield from _difference("hardware", name, first.get(name), second.get(name))
    yield from _difference("hardware", "device", before.header.get("device"), after.header.get("device"))
    for name in _MADE_BY:
        yield from _difference("version", name, first.get(name), second.get(name))
    for name in (*_INPUTS, *_REQUEST):
        for found in _difference("request", name, before.header.get(name), after.header.get(name)):
            if found.name not in _NOT_COMPUTED:
                yield replace(found, kind="input") if found.name.startswith(_INPUTS) else found


def _difference(kind: str, name: str, before: JSON, after: JSON) -> Iterator[Difference]:
    """The leaves that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from _difference(kind, f"{name}.{key}", before.get(key), after.get(key))
    elif before != after:
        yield Difference(kind, name, flat(before), flat(after))


def _by_key(verdicts: Iterable[Verdict]) -> dict[Key, Verdict]:
    return {(v.check, v.subject, v.case, v.dtype, v.device): v for v in verdicts}


def _changes(before: dict[Key, Verdict], after: dict[Key, Verdict], *, alike: bool) -> Iterator[StatusChange]:
    for key, first in before.items():
        second = after.get(key)
        if second is not None and second.status is not first.status:
            check, subject, case, dtype, _ = key
            yield StatusChange(check, subject, case, dtype, first.status, second.status, second.reason, alike)


def _accuracy(before: Run, after: Run, bar: str) -> Iterator[Drift]:
    first, second = ({(u.check, u.subject, u.dtype): u for u in check_uses(run)} for run in (before, after))
    for key, use in first.items():
        other = second.get(key)
        if other is None:
            continue
        cases = {v.case for v in use.verdicts} & {v.case for v in other.verdicts}
        drift = _drift(_said(key), _of_cases(use, cases), _of_cases(other, cases))
        if drift is not None:
            yield replace(drift, word="not judged", why=bar) if bar else drift


def _of_cases(use: CheckUse, cases: set[str]) -> CheckUse:
    verdicts = tuple(verdict for verdict in use.verdicts if verdict.case in cases)
    return CheckUse(use.family, use.check, use.subject, use.dtype, verdicts)


def _drift(name: str, before: CheckUse, after: CheckUse) -> Drift | None:
    """The share of its budget that the worst case took, in both runs."""
    shares = [use.worst[1].used for use in (before, after) if use.worst is not None]
    if len(shares) < 2 or shares[0] is None or shares[1] is None:
        return None
    old, new = shares[0], shares[1]
    ratio = 1.0 if old == new else new / old if old else float("inf")
    word: Word = "equal"
    # A share that is no number fails its check, and is a change of status.
    if ratio >= ACCURACY_EFFECT and new - old >= ACCURACY_SHARE:
        word = "worse"
    elif ratio <= 1 / ACCURACY_EFFECT and old - new >= ACCURACY_SHARE:
        word = "better"
    return Drift(
        f"{name}, share of budget", percent(old), percent(new), ratio, word, "" if word != "equal" else "drift"
    )


@dataclass(frozen=True, slots=True)
class _Samples:
    unit: str
    subject: str
    values: tuple[float, ...]
    # The machine's own rate beside the same point, a value a sample.
    rate: tuple[float, ...] = ()


def _samples(run: Run) -> dict[Key, _Samples]:
    found: dict[Key, _Samples] = {}
    rates: dict[tuple[JSON, JSON], tuple[float, ...]] = {}
    for item in run.measurements:
        point = point_of(item)
        if point is not None and point.get("contestant") == _MACHINE and point.get("quantity") == "gflops":
            rates[point.get("pass"), point.get("length")] = item.samples
    for item in run.measurements:
        point = point_of(item)
        if item.unit not in _LESS_IS_BETTER or (point is not None and point.get("contestant") == _MACHINE):
            continue
        rate = rates.get((point.get("pass"), point.get("length")), ()) if point is not None and item.unit == "s" else ()
        found[_key(item)] = _Samples(item.unit, item.subject, item.samples, rate)
    return found


def _key(item: Measurement) -> Key:
    point = point_of(item) or {}
    return (item.subject, item.case, item.name, str(point.get("dtype", "")), str(point.get("device", "")))


def _judged_subject(run: Run) -> str | None:
    """Of a benchmark only its subject can get worse; its peers are there to be compared with."""
    about = run.header.get("bench")
    subject = about.get("subject") if isinstance(about, dict) else None
    return subject if isinstance(subject, str) else None


def _times(before: dict[Key, _Samples], after: dict[Key, _Samples], bar: str, judged: str | None) -> Iterator[Drift]:
    for key, first in before.items():
        second = after.get(key)
        if second is None or not first.values or not second.values:
            continue
        word, why, p = _judge(first, second)
        if bar:
            word, why = "not judged", bar
        elif judged is not None and first.subject != judged:
            word, why = "not judged", "a peer"
        elif QUANTITIES["wall"] in key:
            word, why = "not judged", "wall time, of which the time is a part"
        old, new = (number(median(item.values), item.unit) for item in (first, second))
        yield Drift(_said(key), old, new, _ratio(first.values, second.values), word, why, p)


def _judge(before: _Samples, after: _Samples) -> tuple[Word, str, float | None]:
    count = min(len(before.values), len(after.values))
    if count < LEAST_SAMPLES:
        return "not judged", f"{count} samples a side; a judgement takes {LEAST_SAMPLES}", None
    if any(math.isnan(value) for value in (*before.values, *after.values)):
        return "not judged", "a sample is no number", None
    p, ratio = mann_whitney(before.values, after.values), _ratio(before.values, after.values)
    if p >= SIGNIFICANT:
        return "equal", "not significant", p
    if 1 / LEAST_EFFECT < ratio < LEAST_EFFECT:
        return "equal", f"below {LEAST_EFFECT}x", p
    if before.unit == "MiB" and abs(median(after.values) - median(before.values)) < LEAST_MIB:
        return "equal", f"within {LEAST_MIB:g} MiB, by which processes of one program differ", p
    work = _work(before), _work(after)
    if work[0] and work[1]:
        relative, relative_p = _ratio(*work), mann_whitney(*work)
        same_way = relative >= LEAST_EFFECT if ratio > 1 else relative <= 1 / LEAST_EFFECT
        if not same_way or relative_p >= SIGNIFICANT:
            return "equal", f"the machine's own rate changed as well: {number(relative)}x of it", p
    return ("worse" if ratio > 1 else "better"), "", p


def _work(item: _Samples) -> tuple[float, ...]:
    """The samples in units of what the machine could do beside them; nothing where that was not measured."""
    if len(item.rate) != len(item.values):
        return ()
    return tuple(value * rate for value, rate in zip(item.values, item.rate, strict=True))


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    old, new = median(before), median(after)
    return 1.0 if old == new else new / old if old else float("inf")
