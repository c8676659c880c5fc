"""One record of many shards': their verdicts in the order of the plan, and a line of how each was run.

It is written anew after each shard's end, from what is kept on disk alone, so that a resumed run and an uninterrupted one
give the same record. A shard that did not do its work is one verdict of its own, `error`, with its log; what it answered
before stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.records import JSON, RUN_FILE, Run, RunWriter, Status, Verdict
from reports.text import one_line

from ..environment import capture
from .keeping import Kept
from .shards import End, Shard, gpu_count

FAMILY, EVENT = "dispatch", "shard"
# What a header says of the machine that its shard ran on.
_OF_THE_MACHINE = ("device", "environment")
# The end of a log that stands in the record itself; the rest is in the shard's folder.
LOG_LINES = 60
# What a command ends with where all was verified, but slower or less accurate than its baseline.
SLOWER = 4


@dataclass(frozen=True, slots=True)
class About:
    """What the record says of the whole run: where, on which GPU, at which price (US$ an hour), by which command."""

    place: str
    gpu: tuple[str, ...]
    timeout: float
    price: float | None
    command: tuple[str, ...]
    git: dict[str, JSON] | None


class Unfinished(KeyboardInterrupt):
    """The record is of the shards that have ended so far; a writer's footer says so when this passes through it."""


def write_record(shards: Sequence[Shard], kept: Kept, about: About) -> None:
    """Write `run.jsonl` of all that is kept. While shards are missing its footer says that the run did not end."""
    missing = [shard.name for shard in shards if kept.ended(shard) is None]
    try:
        with RunWriter(kept.out / RUN_FILE, _header(shards, kept, about)) as writer:
            codes = [_copy(shard, kept, about, writer) for shard in shards]
            if SLOWER in codes:
                writer.verified_code = SLOWER
            if missing:
                raise Unfinished(f"without {', '.join(missing)}")
    except Unfinished:
        return


def _header(shards: Sequence[Shard], kept: Kept, about: About) -> dict[str, JSON]:
    records = [(shard, kept.record(shard)) for shard in shards]
    headers = [(shard, run.header) for shard, run in records if run is not None]
    header: dict[str, JSON] = {}
    for _, found in headers:
        # The first shard's word stands; of the others what it does not say, such as "bench" or "training".
        header = {**found, **header}
    # But not a CPU container's word on the machine: a comparison reads the GPU here.
    on_gpu = next((found for shard, found in headers if shard.on_gpu and _has_gpu(found)), {})
    header |= {key: on_gpu[key] for key in _OF_THE_MACHINE if key in on_gpu}
    suites = list(dict.fromkeys(shard.suite for shard in shards))
    if len(suites) > 1:
        header["claim"] = f"{', '.join(suites)} passed"
    environment = header.get("environment") or capture()
    environment = {**environment, "git": about.git, "command": list(about.command)}
    return {
        **header,
        "device_asked": f"{about.place}: {', '.join(about.gpu) or 'no GPU'}",
        "command": " ".join(about.command),
        "dispatch": {
            "place": about.place, "gpu_asked": list(about.gpu), "timeout": about.timeout, "price_per_hour": about.price,
            "shards": {shard.name: shard.command for shard in shards},
        },
        "environment": environment,
    }  # fmt: skip


def _has_gpu(header: dict[str, JSON]) -> bool:
    environment = header.get("environment")
    return isinstance(environment, dict) and bool(environment.get("gpu"))


def _copy(shard: Shard, kept: Kept, about: About, writer: RunWriter) -> int | None:
    """Write what is kept of a shard; returns its exit code where it did its work."""
    run, end = kept.record(shard), kept.ended(shard)
    if run is not None:
        for event in run.events:
            writer.event(event.kind, **event.data)
        for measurement in run.measurements:
            writer.write(measurement)
        for verdict in run.verdicts:
            writer.write(verdict)
    if end is None:
        return None
    writer.event(EVENT, **_facts(shard, end, run, about))
    if end.problem:
        writer.write(_error(shard, end, run))
        return None
    return end.exit_code


def _facts(shard: Shard, end: End, run: Run | None, about: About) -> dict[str, JSON]:
    # The price is a GPU's: what a container without one costs is not known.
    price = about.price if shard.on_gpu and about.gpu else None
    return {
        "shard": shard.name, "suite": shard.suite, "command": shard.command, "problem": end.problem,
        "exit_code": end.exit_code, "attempts": end.attempts, "container": end.container, "seconds": end.seconds,
        "gpu_asked": list(about.gpu) if shard.on_gpu else [], "gpu": list(end.gpu),
        "cost": None if price is None else round(price * gpu_count(about.gpu) * end.seconds / 3600, 4),
        "environment": None if run is None else run.header.get("environment"),
    }  # fmt: skip


def _error(shard: Shard, end: End, run: Run | None) -> Verdict:
    subject = "" if run is None else run.header.get("subject")
    return Verdict(
        check=f"shard.{shard.name}",
        family=FAMILY,
        subject=subject if isinstance(subject, str) else "",
        case=shard.suite,
        status=Status.ERROR,
        reason=one_line(f"{shard.name} did not do its work: {end.problem}"),
        seconds=end.seconds,
        reproduce=shard.command,
        data={"traceback": "\n".join(end.log.splitlines()[-LOG_LINES:])} if end.log else {},
    )
