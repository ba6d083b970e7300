"""Who competes and who wins: Pareto fronts of loss against costs, failing closed.

A candidate whose loss or any cost is absent, NaN or infinite stands on no front. Nothing here
depends on the order in which candidates come: equals are decided by their key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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

    def figures(self) -> tuple[float, ...]:
        """Loss and costs in one fixed order; only of a point that is `known`."""
        ordered = (self.loss, *(self.costs[name] for name in sorted(self.costs)))
        return tuple(math.inf if v is None else v for v in ordered)


def dominates(a: Point, b: Point) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    pairs = list(zip(a.figures(), b.figures(), strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def fronts(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The known points by front: the first is dominated by none, the next only by the first, ...

    Each front from the lowest loss on.
    """
    left = sorted((p for p in points if p.known), key=_order)
    while left:
        front: list[Point] = []
        for point in left:  # sorted, so whatever dominates a point stands before it
            if not any(dominates(other, point) for other in front):
                front.append(point)
        yield front
        gone = {p.key for p in front}
        left = [p for p in left if p.key not in gone]


def top(points: Sequence[Point], count: int) -> list[Point]:
    """The `count` best: whole fronts first, inside the last one by loss.

    A point that `count` others dominate never changes the result.
    """
    return list(islice(chain.from_iterable(fronts(points)), count))


def best(points: Sequence[Point]) -> Point | None:
    """The known point of the lowest loss, the cheapest among equals; None when none is known."""
    return min((p for p in points if p.known), key=_order, default=None)


def better_half(points: Sequence[Point]) -> list[Point]:
    """The half with the lower losses, rounded up; what failed is not among it."""
    known = sorted((p for p in points if p.known), key=_order)
    return known[: (len(points) + 1) // 2]


def _order(point: Point) -> tuple[tuple[float, ...], str]:
    return point.figures(), point.key
