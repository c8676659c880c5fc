"""How a quantity grows with the length: the exponent of a power law, by least squares in log-log, and each doubling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Through two points every line fits.
LEAST_POINTS = 3


@dataclass(frozen=True, slots=True)
class Fit:
    """value ≈ factor · length^exponent; `residual` is the largest relative distance of a point from that."""

    exponent: float
    factor: float
    residual: float


def power_law(values: Mapping[int, float]) -> Fit | None:
    """The fit through {length: value}; None with fewer than three positive values."""
    points = [(math.log(length), math.log(value)) for length, value in values.items() if value > 0]
    if len(points) < LEAST_POINTS:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    offset = mean_y - exponent * mean_x
    residual = max(abs(math.expm1(y - (offset + exponent * x))) for x, y in points)
    return Fit(exponent, math.exp(offset), residual)


def doublings(values: Mapping[int, float], least: int = 1) -> dict[int, float]:
    """For each length whose double is there too, from `least` on: how much more the double takes."""
    return {
        length: values[2 * length] / value
        for length, value in sorted(values.items())
        if length >= least and value > 0 and 2 * length in values
    }
