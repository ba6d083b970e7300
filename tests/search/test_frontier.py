"""Properties of the budget and of the ranking: they fail closed and do not depend on the order."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.search.costs import Measure
from paretron.search.frontier import Point, best, better_half, dominates, fronts, top

GOOD = st.integers(1, 6).map(float)  # few values, so that there are equals
BAD = st.sampled_from([None, math.nan, math.inf, -math.inf])
FIGURE = st.one_of(GOOD, GOOD, GOOD, BAD)
BOTH = ("params", "ms")
OVER = st.sampled_from([(), ("params",), ("ms",), BOTH])


@st.composite
def point_lists(draw: st.DrawFn, figure: st.SearchStrategy[float | None] = FIGURE) -> list[Point]:
    count = draw(st.integers(0, 12))
    return [
        Point(f"p{k:02}", draw(figure), {"params": draw(figure), "ms": draw(figure)})
        for k in range(count)
    ]


def bad(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def keys(points: list[Point]) -> list[str]:
    return [p.key for p in points]


@given(point_lists(), st.integers(1, 5), OVER)
def test_a_failed_figure_never_wins(points: list[Point], count: int, over: tuple[str]) -> None:
    failed = {p.key for p in points if bad(p.loss) or any(bad(c) for c in p.costs.values())}
    assert not failed & set(keys(top(points, count, over=over)))
    assert not failed & set(keys(better_half(points)))
    winner = best(points)
    assert (winner is None) == (len(failed) == len(points))
    assert winner is None or winner.key not in failed
    assert sum(map(len, fronts(points, over=over))) == len(points) - len(failed)


@given(point_lists(), st.integers(1, 5), OVER, st.randoms())
def test_the_order_does_not_matter(
    points: list[Point], count: int, over: tuple[str], shuffler: random.Random
) -> None:
    mixed = list(points)
    shuffler.shuffle(mixed)
    assert keys(top(points, count, over=over)) == keys(top(mixed, count, over=over))
    assert keys(better_half(points)) == keys(better_half(mixed))
    assert best(points) == best(mixed)


@given(point_lists(), st.integers(1, 5))
def test_under_a_cap_alone_the_lowest_losses_are_kept(points: list[Point], count: int) -> None:
    kept = top(points, count, over=())
    left_out = [p for p in points if p.known and p not in kept]
    assert len(kept) == min(count, len(kept) + len(left_out))
    worst = max((p.loss or 0 for p in kept), default=-math.inf)
    assert all((p.loss or 0) >= worst for p in left_out)


@given(point_lists(), st.integers(1, 5), OVER)
def test_the_lowest_loss_is_always_kept(points: list[Point], count: int, over: tuple[str]) -> None:
    winner = best(points)
    kept = top(points, count, over=over)
    assert (winner is None) == (not kept)
    assert winner is None or kept[0] == winner


@given(point_lists(GOOD), st.integers(1, 5), st.integers(1, 3))
def test_a_cost_that_may_not_be_traded_decides_equals_alone(
    points: list[Point], count: int, much: int
) -> None:
    # Losses all differ: what costs nothing but milliseconds changes no choice over parameters.
    distinct = [replace(p, loss=(p.loss or 0) + 0.01 * k) for k, p in enumerate(points)]
    dearer = [replace(p, costs={**p.costs, "ms": (p.costs["ms"] or 0) * much}) for p in distinct]
    for over in ((), ("params",)):
        assert keys(top(distinct, count, over=over)) == keys(top(dearer, count, over=over))


@given(point_lists(GOOD), st.integers(1, 5), st.data())
def test_a_dominated_candidate_never_changes_the_choice(
    points: list[Point], count: int, data: st.DataObject
) -> None:
    if not points:
        return
    above = data.draw(st.sampled_from(points))
    worse = {axis: value and value + 1 for axis, value in above.costs.items()}
    added = Point("a-new-one", (above.loss or 0) + 1, worse)
    assert dominates(above, added, over=BOTH)
    more = [*points, added]
    assert best(more) == best(points)
    first = next(fronts(points, over=BOTH))
    assert next(fronts(more, over=BOTH)) == first
    if sum(dominates(p, added, over=BOTH) for p in points) >= count:
        assert top(more, count, over=BOTH) == top(points, count, over=BOTH)


@given(point_lists(GOOD), OVER)
def test_fronts_are_what_they_say(points: list[Point], over: tuple[str]) -> None:
    seen: list[Point] = []
    for front in fronts(points, over=over):
        assert not any(dominates(a, b, over=over) for a in front for b in front)
        assert all(any(dominates(q, p, over=over) for q in seen) for p in front) or not seen
        seen += front
    assert sorted(keys(seen)) == sorted(keys(points))


@given(point_lists())
def test_the_better_half_is_half_and_better(points: list[Point]) -> None:
    kept = better_half(points)
    known = [p for p in points if p.known]
    assert len(kept) == min(len(known), (len(points) + 1) // 2)
    worst = max((p.loss or 0 for p in kept), default=-math.inf)
    assert all((p.loss or 0) >= worst for p in known if p not in kept)


@given(
    st.lists(st.one_of(st.floats(1, 100), st.sampled_from([math.nan, math.inf, -math.inf]))),
    st.floats(1, 100),
    st.one_of(st.none(), st.floats(1, 100)),
)
def test_a_budget_holds_only_what_is_known_and_inside(
    values: list[float], most: float, least: float | None
) -> None:
    measure = Measure("params", np.array(values, dtype=float), most, least)
    for value, holds, excess in zip(values, measure.holds(), measure.excess(), strict=True):
        inside = math.isfinite(value) and value <= most and (least is None or value >= least)
        assert holds == inside
        assert (excess == 0) == inside
        assert math.isinf(excess) == (not math.isfinite(value))


def test_equals_are_decided_by_cost_then_by_key() -> None:
    a = Point("a", 1.0, {"params": 2.0})
    b = Point("b", 1.0, {"params": 1.0})
    assert best([a, b]) == b
    assert best([replace(a, key="c"), a]) == a


@pytest.mark.parametrize("count", [1, 2, 3])
def test_over_a_range_the_front_comes_before_the_loss(count: int) -> None:
    # c has a lower loss than the cheap a, but b dominates it.
    a = Point("a", 3.0, {"params": 1.0})
    b = Point("b", 1.0, {"params": 2.0})
    c = Point("c", 2.0, {"params": 3.0})
    assert keys(top([a, b, c], count, over=["params"])) == ["b", "a", "c"][:count]
    assert keys(top([a, b, c], count, over=[])) == ["b", "c", "a"][:count]
