"""How far a tensor is from what was expected, seen from five sides; and candidates that must not pass.

A global number swamps one bad row, one dead channel and a small gain: each has its own side here.

Letters: N rows (all leading axes), M channels (last axis).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

SIDES = ("max", "mean", "row", "channel", "gain")
# A row or channel is judged against its own size, but not below this share of the tensor's: in bf16 the quietest rows
# of a gradient are noise (worst row of a KL gradient off by 1.4 times its own size in both models, seed 12).
QUIET = 1.0


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors, each 0 for equal tensors.

    max: largest |a − e| / largest |e|. mean: mean |a − e| / mean |e|. row, channel: the worst row's, channel's
    rms(a − e) / rms(e). gain: |⟨a, e⟩ / ⟨e, e⟩ − 1|, in which independent errors cancel and a factor does not.
    """

    max: float
    mean: float
    row: float
    channel: float
    gain: float

    def plus(self, other: "Errors") -> "Errors":
        """The sum, side by side."""
        return Errors(*(getattr(self, side) + getattr(other, side) for side in SIDES))

    def larger(self, other: "Errors") -> "Errors":
        """The larger of both, side by side."""
        return Errors(*(max(getattr(self, side), getattr(other, side)) for side in SIDES))

    def used(self, budget: "Errors") -> float:
        """The largest share of `budget` that is used; not a number when an error is."""
        shares = [getattr(self, side) / getattr(budget, side) for side in SIDES]
        return float("nan") if any(s != s for s in shares) else max(shares)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as fp64 `[N, M]`; a vector is one row."""
    wide = x.detach().double()
    return wide.reshape(1, -1) if wide.dim() < 2 else wide.flatten(0, -2)


class _Compared:
    """Two tensors side by side as rows; each side of `Errors` is a method, so that a caller pays for those it reads."""

    def __init__(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        self.a, self.e = as_rows(actual), as_rows(expected)
        self.off = self.a - self.e
        self.size = float(self.e.square().mean().sqrt())

    def max(self) -> float:
        return float(self.off.abs().max() / self.e.abs().max())

    def mean(self) -> float:
        return float(self.off.abs().mean() / self.e.abs().mean())

    def row(self) -> float:
        return self._worst(1)

    def channel(self) -> float:
        # The channels of a single row are its entries: the largest error already says it.
        return self.max() if self.e.shape[0] == 1 and self.e.shape[1] > 1 else self._worst(0)

    def gain(self) -> float:
        return abs(float((self.a * self.e).sum() / self.e.square().sum()) - 1.0)

    def _worst(self, axis: int) -> float:
        own = self.e.square().mean(axis).sqrt()
        return float((self.off.square().mean(axis).sqrt() / own.clamp_min(QUIET * self.size)).max())


def errors(actual: torch.Tensor, expected: torch.Tensor) -> Errors:
    """The five errors of `actual`; infinite when the shapes differ or `actual` is not finite where `expected` is.

    Where nothing but zeros is expected, every error is 0 for zeros and infinite for anything else.
    """
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return Errors(*[float("inf")] * 5)
    sides = _Compared(actual, expected)
    if sides.size == 0:
        return Errors(*[0.0 if bool((sides.off == 0).all()) else float("inf")] * 5)
    return Errors(*(getattr(sides, side)() for side in SIDES))


def rejected(wrong: torch.Tensor, expected: torch.Tensor, allowed: Errors) -> bool:
    """Whether a finite `wrong` exceeds `allowed` on any side; the first that does ends the search."""
    sides = _Compared(wrong, expected)
    return any(
        not getattr(sides, side)() <= getattr(allowed, side) for side in ("max", "gain", "mean", "row", "channel")
    )


def null_candidates(expected: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Wrong tensors by kind, each of which a check of `expected` must reject.

    zeros; rows moved on by one; 4 % too large; the largest channel dead; a buffer whose last third was never
    rewritten. Kinds that leave `expected` as it is (equal rows, a single entry) are left out.
    """
    if expected.numel() == 0 or not bool((expected != 0).any()):
        return
    flat = as_rows(expected)
    shape = expected.shape
    yield "zeros", torch.zeros_like(flat).reshape(shape)
    moved = flat.roll(1, 0) if flat.shape[0] > 1 else flat.roll(1, 1)
    if not torch.equal(moved, flat):
        yield "rows moved", moved.reshape(shape)
    yield "4 % gain", (flat * 1.04).reshape(shape)
    if flat.shape[1] > 1:
        dead = flat.clone()
        dead[:, flat.square().sum(0).argmax()] = 0
        yield "dead channel", dead.reshape(shape)
    if flat.shape[0] > 2:
        stale = flat.clone()
        third = flat.shape[0] // 3
        stale[-third:] = flat[:third]
        if not torch.equal(stale, flat):
            yield "stale buffer", stale.reshape(shape)
