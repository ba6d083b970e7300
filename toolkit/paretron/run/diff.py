"""What differs between two runs, two artifacts, two profiles or two reports."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.run.diff_sides import Fact, Part, Scalar, Side, read_side

# What a reader asks first, first.
ORDER = (
    "goals", "sizes", "shapes", "losses", "tasks", "speedups", "speeds", "recipe", "settings",
    "config", "method", "versions", "hardware", "inputs", "tensors", "weights", "files",
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One fact of which the two sides say different things; None: a side has no such fact.

    `ratio` is b / a of two numbers. Measured values differ always: `apart` is whether their
    intervals do not overlap, and of what is exact always true.
    """

    key: str
    a: Scalar
    b: Scalar
    ratio: float | None
    apart: bool

    def as_json(self) -> dict[str, Any]:
        """The stable form in `diff --json`."""
        return {"key": self.key, "a": self.a, "b": self.b, "ratio": self.ratio, "apart": self.apart}


@dataclass(frozen=True)
class Diff:
    """All that differs, by part, and how many facts were compared in each."""

    a: Side
    b: Side
    compared: Mapping[str, int]
    differences: Mapping[str, tuple[Difference, ...]]

    @property
    def same(self) -> bool:
        """Whether nothing differs but what was measured, within its intervals."""
        return not any(d.apart for found in self.differences.values() for d in found)

    def as_json(self) -> dict[str, Any]:
        """The stable form in `diff --json`."""
        return {
            "kind": self.a.kind,
            "a": str(self.a.place),
            "b": str(self.b.place),
            "same": self.same,
            "compared": dict(self.compared),
            "differences": {
                part: [d.as_json() for d in found] for part, found in self.differences.items()
            },
            "notes": [*self.a.notes, *self.b.notes],
        }


def diff(a: Path, b: Path) -> Diff:
    """Compare two places of one kind; USAGE when they are of different kinds.

    A part that only one side has is left out where that side cannot have it (bytes of a checkpoint
    that no manifest speaks of), so that nothing is called different which nobody knows.
    """
    one, other = read_side(a), read_side(b)
    if one.kind != other.kind:
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{a} is a {one.kind}, {b} is a {other.kind}",
                fix="name two of one kind",
            )
        )
    both = [part for part in ORDER if part in one.parts and part in other.parts]
    found = {part: tuple(_differing(one.parts[part], other.parts[part])) for part in both}
    return Diff(
        one,
        other,
        {part: len({*one.parts[part], *other.parts[part]}) for part in both},
        {part: rows for part, rows in found.items() if rows},
    )


def _differing(one: Part, other: Part) -> Iterator[Difference]:
    """The differing facts, in the order of the first side, then what only the second has."""
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key, _ABSENT), other.get(key, _ABSENT)
        if a.value == b.value and isinstance(a.value, bool) == isinstance(b.value, bool):
            continue
        yield Difference(key, a.value, b.value, _ratio(a.value, b.value), _apart(a, b))


_ABSENT = Fact(None)


def _ratio(a: Scalar, b: Scalar) -> float | None:
    """Of two numbers; None where no float holds it."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    try:
        found = float(b) / float(a) if numbers and a else None  # type: ignore[arg-type]
    except OverflowError:
        return None
    return found if found is not None and math.isfinite(found) else None


def _apart(a: Fact, b: Fact) -> bool:
    if None in (a.low, a.high, b.low, b.high):
        return True
    return bool(a.high < b.low or b.high < a.low)  # type: ignore[operator]
