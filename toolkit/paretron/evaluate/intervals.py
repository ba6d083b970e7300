"""Confidence intervals of means, from units that are drawn alike: windows, documents, questions.

Tokens of one unit are not independent, so units are what is counted. A mean over tokens is a
ratio of two sums over units; its variance is linearised (Cochran, Sampling Techniques, 1977,
section 6.3): n / (n - 1) * sum((y_i - r x_i)^2) / sum(x_i)^2, with r = sum(y) / sum(x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_MANY = 200  # degrees of freedom from which the expansion is exact to 1e-9


def ratio_interval(
    sums: Sequence[float], sizes: Sequence[float]
) -> tuple[float, float | None, float | None]:
    """sum(sums) / sum(sizes) over units, and its 95 % interval; none from fewer than two units.

    Student's t with one degree of freedom less than there are units.
    """
    y, x = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    count, total = len(y), float(x.sum())
    mean = float(y.sum()) / total
    if count < 2:
        return mean, None, None
    residual = float(np.square(y - mean * x).sum())
    reach = t_quantile(count - 1) * math.sqrt(count / (count - 1) * residual) / total
    return mean, mean - reach, mean + reach


def paired_shares(gained: int, lost: int, total: int) -> tuple[float, float]:
    """The 95 % interval of how much a share of `total` rose: `gained` in pairs, `lost` in others.

    Of one more pair each way (Bonett and Price, Adjusted Wald confidence interval for a difference
    of binomial proportions based on paired data, 2012): equal answers to a few questions do not
    say that there is no difference.
    """
    up, down, size = (gained + 1) / (total + 2), (lost + 1) / (total + 2), total + 2
    middle = up - down
    reach = Z * math.sqrt((up + down - middle**2) / size)
    return max(-1.0, middle - reach), min(1.0, middle + reach)


@lru_cache(maxsize=64)
def t_quantile(freedom: int, *, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with `confidence`, for whole degrees of freedom.

    By bisection of the distribution's closed form, or for many degrees by the expansion around the
    normal one (Abramowitz and Stegun, 1964, 26.7.3, 26.7.4 and 26.7.5).
    """
    if freedom >= _MANY:
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        terms = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return sum(term / freedom**k for k, term in enumerate(terms))
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability that |T| is at most t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    series = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        series += term
    sine = math.sin(angle)
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
