"""Paired measuring: the contestants of one pass and length are alive at once, and are asked in turn.

One process for each contestant stays alive for the length, instead of a process for each repetition: starting one costs
seconds (torch, transformers, weights), seven times as many starts would take most of the run, and the first pass after
a start is not the pass that is to be measured. Between its turns a process only waits. The order is A B A B …, so that
whatever drifts on the machine (clock, temperature, neighbours) drifts for all of them, and sample i of one was taken
right beside sample i of the other. A process that ends, for whatever reason, ends its own samples and nobody else's.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from reports.records import JSON, Measurement, Verdict
from reports.schema import Measure, NullCandidate, Status
from reports.timings import FAMILY, QUANTITIES

from .flops import model_flop, operator_flop
from .point import MACHINE, Point, is_operator
from .process import Worker, WorkerError
from .subjects import DENSE_FLASH, flash_config

# Fewer paired samples say nothing about a ratio.
LEAST_SAMPLES = 3
UNITS = {"seconds": "s", "wall": "s", "peak_mib": "MiB", "gflops": "GFLOP/s", "blas_gflops": "GFLOP/s"}


@dataclass(slots=True)
class Series:
    """The samples of one point, in the order in which they were taken; `error` is why there are no more."""

    point: Point
    ready: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    # Seconds since the group began at which each sample was complete.
    at: list[float] = field(default_factory=list)
    error: WorkerError | None = None

    def add(self, answer: dict[str, float], at: float) -> None:
        """One answer of the worker."""
        for name, value in answer.items():
            self.samples.setdefault(name, []).append(value)
        self.at.append(at)

    @property
    def count(self) -> int:
        """Samples so far."""
        return len(self.at)

    def middle(self, quantity: str) -> float:
        """The median of a quantity."""
        return median(self.samples[quantity])

    @property
    def flop(self) -> float | None:
        """What the pass needs; None where a loss is added that `model_flop` does not count."""
        point = self.point
        config = point.model_config()
        if is_operator(point.pass_):
            return operator_flop(config, point.pass_, point.length, point.batch)
        if config.indexer_kl_coef > 0:
            return None
        dense = point.contestant == DENSE_FLASH
        if dense:
            config = flash_config(config)
        return model_flop(
            config, point.pass_, point.length, point.batch, dense=dense or not config.use_sparse_attention
        )

    def measurements(self) -> list[Measurement]:
        """A record a quantity; none without samples."""
        point = self.point
        shared: dict[str, JSON] = {
            "contestant": point.contestant, "pass": point.pass_, "length": point.length, "batch": point.batch,
            "dtype": point.dtype, "device": point.device, "threads": point.threads,
            "backend": self.ready.get("backend", ""), "at": list(self.at),
        }  # fmt: skip
        if point.contestant != MACHINE:
            shared |= {
                "flop": self.flop,
                "weights_mib": self.ready.get("weights_mib"),
                "memory": self.ready.get("memory"),
                "implementations": self.ready.get("implementations", {}),
                "checksums": list(self.samples.get("checksum", [])),
            }
        return [
            Measurement(
                name=QUANTITIES[quantity],
                subject=point.contestant,
                case=point.case,
                samples=tuple(self.samples[quantity]),
                unit=UNITS[quantity],
                data={"point": {**shared, "quantity": quantity}},
            )
            for quantity in UNITS
            if self.samples.get(quantity)
        ]

    def verdict(self, reproduce: str) -> Verdict:
        """Verified when every sample came, of output that was looked at; an error when the process gave none."""
        point = self.point
        rejected = self.ready.get("rejected", {})
        status, reason, detail = Status.ERROR, "", ""
        measures: tuple[Measure, ...] = ()
        if self.error is not None:
            reason, detail = f"{point.contestant}: {self.error}", self.error.detail
        else:
            status = Status.VERIFIED if rejected and all(rejected.values()) else Status.VACUOUS
            reason = f"{point.contestant}: {self.middle('seconds'):.3g} s, {self.middle('peak_mib'):.3g} MiB"
        if self.count:
            measures = (
                # A pass whose output is garbage ends its process.
                Measure("passes with garbage as output", 0.0, 0.0),
                Measure(QUANTITIES["seconds"], self.middle("seconds"), unit="s"),
                Measure(QUANTITIES["peak_mib"], self.middle("peak_mib"), unit="MiB"),
                Measure("different checksums", float(len(set(self.samples["checksum"])))),
            )
        return Verdict(
            check=f"{FAMILY}.{point.contestant}",
            family=FAMILY,
            subject=point.contestant,
            case=point.case,
            status=status,
            dtype=point.dtype,
            device=point.device,
            reason=reason,
            measures=measures,
            nulls=tuple(NullCandidate(kind, bool(seen)) for kind, seen in rejected.items()),
            seconds=sum(self.samples.get("wall", ())),
            reproduce=reproduce,
            data={"traceback": detail} if detail else {},
        )


def measure(
    points: list[Point],
    repeats: int,
    timeout: float,
    series: list[Series],
    started: Callable[[str, str], None],
    machine: Worker | None = None,
) -> None:
    """Run each of `points` `repeats` times, in turn, and put what comes into `series` as it comes.

    Args:
        timeout: seconds that one answer may take; building a model is one.
        series: filled in place, so that an interruption loses nothing; one a point, behind it one of the machine.
        started: told what runs now, for a progress line.
        machine: the worker that measures the machine's rate, asked at the head of each round.
    """
    began = time.monotonic()
    series.extend(Series(point) for point in points)
    rate = None if machine is None else Series(points[0].of(MACHINE), machine.ready)
    if rate is not None:
        series.append(rate)
    with ExitStack() as stack:
        workers: dict[int, Worker] = {}

        def attempt(index: int, act: Callable[[], None]) -> None:
            try:
                act()
            except WorkerError as error:
                series[index].error = error
                if index in workers:
                    # Its memory is needed by the others.
                    workers.pop(index).close()

        def await_ready(index: int) -> None:
            series[index].ready = workers[index].ready

        def ask(index: int) -> None:
            series[index].add(workers[index].run(), time.monotonic() - began)

        # They build side by side, because nothing is measured yet.
        for index, point in enumerate(points):
            workers[index] = Worker(point, timeout)
            stack.callback(workers[index].close)
        for index, point in enumerate(points):
            started(point.case, f"{point.contestant} starts")
            attempt(index, partial(await_ready, index))
        for number in range(repeats):
            if machine is not None and rate is not None and rate.error is None:
                try:
                    rate.add(machine.run(), time.monotonic() - began)
                except WorkerError as error:
                    rate.error = error
            for index, point in enumerate(points):
                if index in workers:
                    started(point.case, f"{point.contestant}, {number + 1} of {repeats}")
                    attempt(index, partial(ask, index))
