"""Time and memory of a run of `v32 bench`: a table by pass, length and contestant, growth, and floors.

A measurement takes part by `data["point"]`: {"quantity": a key of `QUANTITIES`, "contestant", "pass", "length",
"batch", "backend", "implementations", "flop", …}. The header holds "bench": {"subject": the contestant that the others are compared with, "peak_tflops": what was given, or null}.
Events called "growth" hold {"contestant", "pass", "quantity", "exponent", "residual", "doublings"}, those called
"floor" {"claim", "found", "met", "judged", "source"}.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from reports.schema import Event, Measurement, Run
from reports.strict_json import JSON
from reports.text import number, percent

FAMILY = "bench"
QUANTITIES = {"seconds": "time", "wall": "wall time", "peak_mib": "peak growth", "gflops": "matmul rate",
              "blas_gflops": "matmul rate of torch's BLAS"}  # fmt: skip
_MACHINE = "machine"
COLUMNS = (
    "pass", "contestant", "backend", "samples", "time", "range", "peer / subject", "MiB", "peer / subject",
    "GFLOP/s", "of the rate",
)  # fmt: skip
# Columns that a narrow terminal leaves out.
DETAILS = (2, 3, 5, 9)
GROWTH_COLUMNS = ("pass", "contestant", "what grows", "exponent", "largest residual", "at each doubling")
FLOOR_COLUMNS = ("floor", "found", "met", "why this floor")


@dataclass(frozen=True, slots=True)
class Row:
    """A point: its samples of each quantity, and what it was."""

    pass_: str
    length: int
    case: str
    contestant: str
    backend: str
    flop: float | None
    samples: dict[str, tuple[float, ...]]

    def middle(self, quantity: str) -> float | None:
        """The median of a quantity, None without samples."""
        found = self.samples.get(quantity)
        return median(found) if found else None


@dataclass(frozen=True, slots=True)
class Timings:
    """The points of a run, and what was made of them when it ran."""

    subject: str
    peak_gflops: float | None
    rows: tuple[Row, ...]
    growth: tuple[Event, ...]
    floors: tuple[Event, ...]

    def cells(self) -> list[list[str]]:
        """A row a point: median and range of the time, peak growth, both against the subject's, share of the rate."""
        return [self._cells(row) for row in self.rows if row.contestant != _MACHINE]

    def _cells(self, row: Row) -> list[str]:
        times = row.samples.get("seconds", ())
        span = f"{number(min(times))} to {number(max(times))}" if times else ""
        time, peak = row.middle("seconds"), row.middle("peak_mib")
        measured = next((other.middle("gflops") for other in self._beside(row) if other.contestant == _MACHINE), None)
        rate = self.peak_gflops or measured
        speed = row.flop / time / 1e9 if row.flop and time else None
        return [
            row.case, row.contestant, row.backend, str(len(times)), _shown(time, "s"), span, self._ratio(row, "seconds"),
            _shown(peak), self._ratio(row, "peak_mib"), _shown(speed), percent(speed / rate) if speed and rate else "",
        ]  # fmt: skip

    def _beside(self, row: Row) -> list[Row]:
        return [other for other in self.rows if (other.pass_, other.length) == (row.pass_, row.length)]

    def _ratio(self, row: Row, quantity: str) -> str:
        own = next((other.middle(quantity) for other in self._beside(row) if other.contestant == self.subject), None)
        value = row.middle(quantity)
        return (
            "" if own is None or value is None or row.contestant == self.subject or not own else f"{value / own:.3g}x"
        )

    def growth_cells(self) -> list[list[str]]:
        """A row a contestant, pass and quantity: the exponent of its power law, and each doubling."""
        return [
            [
                *(str(event.data.get(key, "")) for key in ("pass", "contestant", "quantity")),
                *(_shown(event.data.get(key)) for key in ("exponent",)),
                _share(event.data.get("residual")),
                _doublings(event.data.get("doublings")),
            ]
            for event in self.growth
        ]

    def floor_cells(self) -> list[list[str]]:
        """A row a floor: what was asked, what was found, whether it was met, and where it comes from."""
        return [
            [
                *(str(event.data.get(key, "")) for key in ("claim", "found")),
                "yes" if event.data.get("met") is True else "no" if event.data.get("met") is False else "not measured",
                str(event.data.get("source", "")),
            ]
            for event in self.floors
        ]

    def notes(self) -> list[str]:
        """What the numbers are, and what bounds them, in sentences."""
        found = ["Times and peaks are medians; a value of peer / subject above 1 means that the subject is better."]
        rates, blas = (
            [value for row in self.rows for value in row.samples.get(name, ())] for name in ("gflops", "blas_gflops")
        )
        if rates:
            found.append(
                f"The machine multiplied matrices at {number(median(rates), 'GFLOP/s')} ({number(min(rates))} to "
                f"{number(max(rates))}) between the passes"
                + (f", torch's own BLAS at {number(median(blas))}." if blas and median(blas) < median(rates) else ".")
            )
        rate = f"the given peak of {number(self.peak_gflops / 1e3, 'TFLOP/s')}" if self.peak_gflops else "that rate"
        if rates or self.peak_gflops:
            found.append(
                f"The last column is what the pass's matrix products need at {rate}, as a share of the time it took. "
                "The rest of the time is not bound by arithmetic: top-k, gathers, element-wise work, memory."
            )
        return found

    def floors_are_judged(self) -> bool:
        """Whether a missed floor fails the run."""
        return any(event.data.get("judged") is True for event in self.floors)


def timings(run: Run) -> Timings | None:
    """The time and memory of `run`; None for a run without points."""
    rows: dict[tuple[str, int, str], Row] = {}
    for item in run.measurements:
        point = point_of(item)
        if point is None:
            continue
        pass_, length, contestant = str(point.get("pass", "")), point.get("length"), str(point.get("contestant", ""))
        if not isinstance(length, int):
            continue
        flop = point.get("flop")
        row = rows.setdefault(
            (pass_, length, contestant),
            Row(pass_, length, item.case, contestant, _backend(point),
                float(flop) if isinstance(flop, (int, float)) else None, {}),
        )  # fmt: skip
        row.samples[str(point.get("quantity", ""))] = item.samples
    if not rows:
        return None
    given = run.header.get("bench")
    about = given if isinstance(given, dict) else {}
    subject, peak = str(about.get("subject", "")), about.get("peak_tflops")
    peak_gflops = 1e3 * peak if isinstance(peak, (int, float)) else None
    events = {kind: tuple(event for event in run.events if event.kind == kind) for kind in ("growth", "floor")}
    return Timings(subject, peak_gflops, tuple(rows.values()), events["growth"], events["floor"])


def point_of(item: Measurement) -> dict[str, JSON] | None:
    """What a measurement says of its point, None for a measurement of another kind."""
    found = item.data.get("point")
    return found if isinstance(found, dict) else None


def _backend(point: dict[str, JSON]) -> str:
    """The backend, and the path of attention where the contestant has several."""
    parts = point.get("implementations")
    path = parts.get("attention") if isinstance(parts, dict) else None
    return str(point.get("backend", "")) + (f", {path}" if isinstance(path, str) else "")


def _shown(value: JSON, unit: str = "") -> str:
    return number(float(value), unit) if isinstance(value, (int, float)) else ""


def _share(value: JSON) -> str:
    return percent(float(value)) if isinstance(value, (int, float)) else ""


def _doublings(value: JSON) -> str:
    if not isinstance(value, dict):
        return ""
    return ", ".join(f"{_shown(ratio)}x from {length}" for length, ratio in value.items())
