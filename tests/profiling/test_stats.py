"""Intervals of medians, and paired ratios."""

from __future__ import annotations

import random
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron_profiling.stats import median_interval, paired_ratios, percentile

values = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=40)


@given(values, st.floats(0.5, 20))
def test_interval_holds_the_median_and_scales(found: list[float], factor: float) -> None:
    interval = median_interval(found)
    assert min(found) <= interval.low <= interval.median <= interval.high <= max(found)
    scaled = median_interval([factor * v for v in found])
    assert scaled.median == pytest.approx(factor * interval.median)
    assert (scaled.low, scaled.high) == pytest.approx(
        (factor * interval.low, factor * interval.high)
    )


@given(values, st.randoms(use_true_random=False))
def test_order_does_not_matter(found: list[float], rng: random.Random) -> None:
    shuffled = list(found)
    rng.shuffle(shuffled)
    assert median_interval(shuffled) == median_interval(found)


@pytest.mark.parametrize("n", range(1, 41))
def test_it_is_the_narrowest_pair_that_keeps_its_promise(n: int) -> None:
    interval = median_interval(list(range(n)))
    k = int(interval.low) + 1

    def coverage(k: int) -> float:
        return 1 - 2 * sum(comb(n, i) for i in range(k)) / 2**n

    assert interval.high == n - k
    if n < 6:
        assert (interval.low, interval.high) == (0, n - 1)
    else:
        assert interval.coverage == pytest.approx(coverage(k))
        assert interval.coverage >= 0.95 > coverage(k + 1)


def test_coverage_is_what_it_says() -> None:
    """Draws from a skewed distribution of median log 2: the share of intervals that hold it."""
    rng = random.Random(0)
    for n, expected in ((3, 0.75), (5, 0.9375), (11, 0.988)):
        draws = [median_interval([rng.expovariate(1) for _ in range(n)]) for _ in range(4000)]
        held = sum(d.low <= 0.6931 <= d.high for d in draws) / len(draws)
        assert draws[0].coverage == pytest.approx(expected, abs=1e-3)
        assert held == pytest.approx(expected, abs=0.025)


# Of a round: the teacher's speed, the ratio, and the machine's drift.
rounds_of = st.tuples(st.floats(1, 100), st.floats(1, 3), st.floats(0.2, 5))


@given(st.lists(rounds_of, min_size=1, max_size=9))
def test_drift_cancels_in_pairs(rounds: list[tuple[float, float, float]]) -> None:
    """What slows both runs of a round by the same factor leaves its ratio alone."""
    still = paired_ratios([a * r for a, r, _ in rounds], [a for a, _, _ in rounds])
    drifting = paired_ratios([a * r * d for a, r, d in rounds], [a * d for a, _, d in rounds])
    assert drifting == pytest.approx(still)


@given(values, st.floats(0, 100))
def test_percentiles_are_numpys(found: list[float], percent: float) -> None:
    assert percentile(found, percent) == pytest.approx(np.percentile(found, percent))


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios([1.0, 2.0], [1.0])
