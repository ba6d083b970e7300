"""Who competes and who wins: Pareto fronts of loss against costs, failing closed.

A candidate whose loss or any cost is absent, NaN or infinite stands on no front. Nothing here
depends on the order in which candidates come: equals are decided by their key.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice


@dataclass(frozen=True)
class Point:
    """One candidate: its loss (lower is better) and its costs; None is a figure that failed."""

    key: str
    loss: float | None
    costs: Mapping[str, float | None]

    @property
    def known(self) -> bool:
        """Whether every figure is there and finite."""
        return all(v is not None and math.isfinite(v) for v in (self.loss, *self.costs.values()))

    def figures(self, over: Collection[str]) -> tuple[float, ...]:
        """Loss and the costs in `over`, in one fixed order; only of a point that is `known`."""
        ordered = (self.loss, *(self.costs[name] for name in sorted(over)))
        return tuple(math.inf if v is None else v for v in ordered)


def dominates(a: Point, b: Point, *, over: Collection[str]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better, in loss and costs `over`."""
    pairs = list(zip(a.figures(over), b.figures(over), strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def fronts(points: Sequence[Point], *, over: Collection[str]) -> Iterator[list[Point]]:
    """The known points by front: the first is dominated by none, the next only by the first, ...

    Each front from the lowest loss on.
    """
    left = sorted((p for p in points if p.known), key=lambda p: _order(p, over))
    while left:
        front: list[Point] = []
        for point in left:  # sorted, so whatever dominates a point stands before it
            if not any(dominates(other, point, over=over) for other in front):
                front.append(point)
        yield front
        gone = {p.key for p in front}
        left = [p for p in left if p.key not in gone]


def top(points: Sequence[Point], count: int, *, over: Collection[str]) -> list[Point]:
    """The `count` best: whole fronts over some costs first, inside the last one by loss.

    Over no cost these are the lowest losses. A point that `count` others dominate never changes
    the result.
    """
    return list(islice(chain.from_iterable(fronts(points, over=over)), count))


def best(points: Sequence[Point]) -> Point | None:
    """The known point of the lowest loss, the cheapest among equals; None when none is known."""
    return min((p for p in points if p.known), key=_order, default=None)


def better_half(points: Sequence[Point]) -> list[Point]:
    """The half with the lower losses, rounded up; what failed is not among it."""
    known = sorted((p for p in points if p.known), key=_order)
    return known[: (len(points) + 1) // 2]


def _order(point: Point, over: Collection[str] = ()) -> tuple[tuple[float, ...], str]:
    """By loss, then by the costs in `over`, by all others, and by key."""
    others = point.costs.keys() - set(over)
    return (*point.figures(over), *point.figures(others)[1:]), point.key
