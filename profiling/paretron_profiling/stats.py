"""Medians with honest intervals from few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A median, and an interval that holds the true median with at least `coverage`."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """The sample median with the narrowest symmetric pair of order statistics around it.

    The pair of the k-th smallest and k-th largest of n independent values misses the true median
    with probability 2 * P(Binomial(n, 1/2) < k), whatever the distribution. Where even the whole
    range stays below `confidence` (n < 6 for 95 %), the whole range is taken, and `coverage` says
    how little it promises: 0.75 for three values.
    """
    ordered = sorted(values)
    n = len(ordered)
    k = 1
    while 2 * (k + 1) <= n and _coverage(n, k + 1) >= confidence:
        k += 1
    return Interval(median(ordered), ordered[k - 1], ordered[n - k], _coverage(n, k))


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios of values measured in the same round, so that slow drift of the machine cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _coverage(n: int, k: int) -> float:
    return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n if n > 1 else 0.0
