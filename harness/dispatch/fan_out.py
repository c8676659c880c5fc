"""Runs many shards at once, keeps what comes as it comes, and tries again where the machine failed, not the check."""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Semaphore, Thread

from rich.console import Console

from reports.records import FAILING, JSON
from reports.strict_json import loads
from reports.terminal import print_line
from reports.text import duration, one_line

from .keeping import Kept
from .shards import End, Items, Piece, Shard

# After the first attempt; and how long to wait before each, in seconds.
RETRIES, PAUSE = 2, 2.0
# The same after a cut download: a network needs longer to come back than another machine takes to be found.
NETWORK_PAUSE = 30.0


class InfrastructureError(Exception):
    """A machine failed rather than a command: worth another attempt on another machine."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where shards run: `run` gives a shard's pieces and then its `End`; at most `at_once` of them together.

    `infrastructure`: exceptions of `run` that are no answer of the command, for which it is tried again.
    """

    name: str
    run: Callable[[Shard], Items]
    at_once: int
    infrastructure: tuple[type[BaseException], ...] = (InfrastructureError,)
    describe: Callable[[BaseException], str] = lambda error: f"{type(error).__name__}: {one_line(str(error))}"


@dataclass(frozen=True, slots=True)
class _Retry:
    reason: str


def fan_out(shards: Sequence[Shard], place: Place, kept: Kept, console: Console, ended: Callable[[], None]) -> None:
    """Run all `shards` at `place`, keep what comes in `kept`, and call `ended` after each one's end.

    A shard that waits for another begins when that one has done its work; one whose other is not in `shards` at once.
    A KeyboardInterrupt leaves the shards to whoever can stop them: their threads are daemons.
    """
    inbox: SimpleQueue[tuple[Shard, Piece | End | _Retry]] = SimpleQueue()
    slots = Semaphore(place.at_once)

    def start(shard: Shard) -> None:
        Thread(target=_attempts, args=(shard, place, slots, inbox), name=shard.name, daemon=True).start()

    names = {shard.name for shard in shards}
    for shard in shards:
        if shard.after not in names:
            start(shard)
    tickers = {shard.name: _Ticker(shard, console) for shard in shards}
    done = 0
    while done < len(shards):
        shard, item = inbox.get()
        if isinstance(item, Piece):
            kept.add(shard, item)
            tickers[shard.name].piece(item)
        elif isinstance(item, _Retry):
            tickers[shard.name].say(f"{item.reason}; trying again")
        else:
            done += 1
            end = kept.finish(shard, item)
            tickers[shard.name].end(end, f"{done} of {len(shards)}")
            ended()
            for waiting in (other for other in shards if other.after == shard.name):
                if end.problem:
                    inbox.put((waiting, End(problem=f"it waits for {shard.name}, which did not do its work")))
                else:
                    start(waiting)


def _attempts(shard: Shard, place: Place, slots: Semaphore, inbox: SimpleQueue) -> None:
    """One thread a shard; whatever happens in it, its last word in `inbox` is an `End`."""
    with slots:
        for attempt in range(1, RETRIES + 2):
            started = time.monotonic()
            try:
                end = _attempt(shard, place, inbox)
            # Not only Exception: what a remote process raised arrives as it was, a SystemExit too.
            except BaseException as error:
                reason = place.describe(error)
                if attempt <= RETRIES and isinstance(error, place.infrastructure):
                    inbox.put((shard, _Retry(reason)))
                    time.sleep(PAUSE * attempt)
                    continue
                text = "".join(traceback.format_exception(error))
                end = End(problem=reason, seconds=round(time.monotonic() - started, 3), log=text)
            if attempt <= RETRIES and end.infrastructure:
                inbox.put((shard, _Retry(end.problem)))
                time.sleep(NETWORK_PAUSE * attempt)
                continue
            inbox.put((shard, replace(end, attempts=attempt)))
            return


def _attempt(shard: Shard, place: Place, inbox: SimpleQueue) -> End:
    items = place.run(shard)
    with closing(items):
        for item in items:
            if isinstance(item, End):
                return item
            if not isinstance(item, Piece):
                return End(problem=f"it returned what is no record: {str(item)[:80]!r}")
            inbox.put((shard, item))
    return End(problem="it went away without saying how it ended")


class _Ticker:
    """Says on the terminal what one shard does: that it began, each verdict to look at, how it ended."""

    def __init__(self, shard: Shard, console: Console) -> None:
        self.shard, self.console = shard, console
        self.counts: dict[str, int] = {}

    def say(self, text: str) -> None:
        print_line(self.console, f"{self.shard.name}: {text}")

    def piece(self, piece: Piece) -> None:
        if piece.at == 0:
            self.counts.clear()
        for line in piece.text.splitlines():
            fields = _fields(line)
            if fields.get("record") == "header":
                self.say("began")
            if fields.get("record") == "verdict":
                status = str(fields.get("status"))
                self.counts[status] = self.counts.get(status, 0) + 1
                if status in set(FAILING):
                    named = (status, fields.get("check"), fields.get("dtype"), fields.get("case"), fields.get("reason"))
                    self.say("  ".join(one_line(str(part)) for part in named if part))

    def end(self, end: End, progress: str) -> None:
        tally = ", ".join(f"{count} {status}" for status, count in self.counts.items()) or "no verdict"
        where = f" on {', '.join(end.gpu)}" if end.gpu else ""
        tried = f", attempt {end.attempts}" if end.attempts > 1 else ""
        trouble = f" — ERROR: {end.problem}" if end.problem else ""
        self.say(f"{tally} in {duration(end.seconds)}{where}{tried} [{progress}]{trouble}")


def _fields(line: str) -> dict[str, JSON]:
    try:
        found = loads(line.encode("utf-8", "replace"))
    except ValueError:
        # A damaged line is said at the shard's end, when its whole record is read.
        return {}
    return found if isinstance(found, dict) else {}
