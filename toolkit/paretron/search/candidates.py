"""From all shapes to the candidates: within the budget, servable, the widest of their kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Sizes
from paretron.recipe import Search
from paretron.search.costs import Measure
from paretron.search.space import Shapes

Servable = Callable[[Sizes], bool]


@dataclass(frozen=True)
class Candidate:
    """One shape and what it costs by each measure of the budget."""

    sizes: Mapping[str, int]
    costs: Mapping[str, float]

    @property
    def key(self) -> str:
        """A name that is the shape: the same in every run."""
        return ".".join(f"{axis}-{size}" for axis, size in sorted(self.sizes.items()))

    def as_json(self) -> dict[str, Any]:
        """The stable form in candidates.json and search.json."""
        return {"sizes": dict(self.sizes), "costs": dict(self.costs)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Candidate:
        """The inverse of `as_json`."""
        return cls(dict(value["sizes"]), dict(value["costs"]))


def all_hold(shapes: Shapes, budget: Sequence[Measure]) -> npt.NDArray[np.bool_]:
    """Which shapes are within every bound of the budget."""
    inside = np.ones(len(shapes), dtype=bool)
    for measure in budget:
        inside &= measure.holds()
    return inside


def select(
    shapes: Shapes, budget: Sequence[Measure], *, servable: Servable, widest: bool
) -> list[Candidate]:
    """The candidates, from the smallest shape to the largest.

    With `widest`, of shapes that differ in their MLP alone only the widest that is within the
    budget and servable (paper 1, table 19). `servable` is asked no more often than needed.
    """
    chosen = np.flatnonzero(all_hold(shapes, budget))
    within = shapes.of(chosen)
    others = [axis for axis in within.sizes if axis not in ("ffn", "moe_ffn")]
    ffn = [within.sizes[axis] for axis in ("ffn", "moe_ffn") if axis in within.sizes]
    # numpy sorts by the last key first: combinations stay together, their widest MLP in front.
    order = np.lexsort([*(-f for f in ffn), *(within.sizes[axis] for axis in reversed(others))])
    found: list[Candidate] = []
    last: tuple[int, ...] | None = None
    for k in order.tolist():
        size = within.at(k)
        kind = tuple(size[axis] for axis in others)
        if (widest and kind == last) or not servable(size):
            continue
        last = kind
        number = chosen[k]
        found.append(Candidate(size, {m.name: float(m.values[number]) for m in budget}))
    return sorted(found, key=lambda c: tuple(c.sizes[axis] for axis in sorted(c.sizes)))


def refuse_none(where: str, shapes: Shapes, budget: Sequence[Measure]) -> None:
    """RECIPE_TARGET naming the nearest reachable shape, when no shape is within the budget."""
    if not len(shapes):
        raise _unreachable(where, "the space has no shape that the teacher can be cut to", "")
    if all_hold(shapes, budget).any():
        return
    excess = np.zeros(len(shapes))
    for measure in budget:
        excess = np.maximum(excess, measure.excess())
    best = int(np.argmin(excess))
    if not np.isfinite(excess[best]):
        unknown = [m.name for m in budget if not np.isfinite(m.values).any()]
        about = ", ".join(unknown) or "every shape"
        raise _unreachable(where, f"no figure of {about} for any shape", "a table that covers it")
    size = shapes.at(best)
    costs = ", ".join(f"{m.name} {m.values[best]:.6g}" for m in budget)
    raise _unreachable(
        where,
        f"none of {len(shapes)} shapes is within the budget",
        f"nearest reachable: {costs} with {shape_words(size)}",
    )


def refuse_unfit(where: str, found: Sequence[Candidate], search: Search) -> None:
    """RECIPE_TARGET when no shape within the budget is servable, RECIPE_VALUE when too many are."""
    if not found:
        cause = "no shape within the budget can be served by the recipe's exports"
        raise _unreachable(where, cause, "other sizes, or other exports")
    if len(found) > search.max_candidates:
        cause = f"{len(found)} candidates within the budget, more than {search.max_candidates}"
        fix = "a larger `multiple`, a narrower budget ([least, most]), or a larger number here"
        where = f"{where}.max_candidates"
        raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))


def shape_words(size: Sizes) -> str:
    """A shape as people write it in a recipe."""
    heads = size["kv_heads"] * size["q_per_kv"]
    shown = {k: size[k] for k in ("layers", "hidden", "ffn", "experts", "moe_ffn") if k in size}
    shown |= {"heads": heads, "kv_heads": size["kv_heads"]}
    return ", ".join(f"{axis} {n}" for axis, n in shown.items())


def _unreachable(where: str, cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.RECIPE_TARGET, cause, where=where, fix=fix))
