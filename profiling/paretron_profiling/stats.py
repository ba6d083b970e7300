"""Medians with honest intervals from few samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

CONFIDENCE = 0.95
PERCENTILES = (50, 90, 95, 99)


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


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent lie, linear between the two nearest; needs one value.

    Place (n - 1) * percent / 100 of the sorted values, as numpy and vLLM's own benchmark have it.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Those that are stated of latencies, "p50" to "p99"; needs one value."""
    return {f"p{p}": percentile(values, p) for p in PERCENTILES}


def relative_spread(values: Sequence[float]) -> float | None:
    """(max - min) / median; None without values."""
    return (max(values) - min(values)) / median(values) if values else None


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratios of values measured in the same round, so that slow drift of the machine cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _coverage(n: int, k: int) -> float:
    return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n if n > 1 else 0.0
