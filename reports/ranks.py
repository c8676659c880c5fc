"""Whether two sets of samples differ: the exact test of Mann and Whitney, for any number of samples and with ties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p: how often samples that are drawn alike lie as far apart as these, by the sums of their ranks.

    Counted over every way to deal the pooled samples out, on their mid-ranks, so that it is exact with ties and for few
    samples. The least that n samples a side can give is 2 / C(2n, n): 0.0006 for 7.

    Raises:
        ValueError: a side without samples, or a sample that is no number.
    """
    n, pooled = len(first), np.array([*first, *second], dtype=np.float64)
    if not first or not second:
        raise ValueError(f"samples are {n} and {len(second)}; both sides need one or more.")
    if np.isnan(pooled).any():
        raise ValueError("samples hold NaN, which has no rank; leave it out.")
    ordered = np.sort(pooled)
    # Twice the mid-rank, so that it is a whole number.
    ranks = np.searchsorted(ordered, pooled, "left") + np.searchsorted(ordered, pooled, "right") + 1
    # ways[i, s]: how many ways there are to take i of the samples so far whose ranks add up to s.
    ways = np.zeros((n + 1, int(ranks.sum()) + 1))
    ways[0, 0] = 1.0
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    deals = ways[n] / ways[n].sum()
    sums, middle = np.arange(len(deals)), ranks.sum() * n / len(pooled)
    # The middle is a quotient; what lies as far from it must count in spite of its rounding.
    return float(min(1.0, deals[np.abs(sums - middle) >= abs(ranks[:n].sum() - middle) - 1e-9].sum()))
