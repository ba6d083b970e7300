"""What many shapes cost, all at once: the same counts as those of one config, on arrays.

Exact where all layers are alike; where layers are of several kinds (some with experts), a count
depends on which layers stay, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from paretron.errors import Code, ParetronError, Problem
from paretron.families import Family, Tensor
from paretron.families.counts import EMBEDDINGS
from paretron.families.experts import PER_TOKEN
from paretron.plan.cost import BYTES_OF
from paretron.recipe import Budget, Speed
from paretron.recipe.searching import Limit
from paretron.search.space import IntArray, Shapes
from paretron.search.table import OperatorTable, predicted_ms

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measure:
    """One measure of a budget: what each shape costs (NaN: unknown), and between which bounds."""

    name: str
    values: FloatArray
    at_most: float
    at_least: float | None = None

    def holds(self) -> npt.NDArray[np.bool_]:
        """Which shapes are within the bounds; an unknown or infinite figure never is."""
        inside = np.isfinite(self.values) & (self.values <= self.at_most)
        return inside if self.at_least is None else inside & (self.values >= self.at_least)

    def excess(self) -> FloatArray:
        """By which share a bound is missed, 0 inside, infinite where the figure is unknown."""
        known = np.isfinite(self.values) & (self.values > 0)
        values = np.where(known, self.values, 1.0)
        over = np.maximum(values / self.at_most - 1, 0.0)
        if self.at_least is not None:
            over = np.maximum(over, self.at_least / values - 1)
        return np.where(known, over, np.inf)


def measures(
    budget: Budget,
    shapes: Shapes,
    *,
    family: Family,
    config: Mapping[str, Any],
    dtype: str,
    table: OperatorTable | None = None,
) -> tuple[Measure, ...]:
    """Every measure that a budget states, for shapes of a teacher's `config`.

    `dtype` is the student's, as safetensors names it. A speed without its `table` is left out: it
    has to be measured first. Errors: UNSUPPORTED for layers of several kinds.
    """
    counts = _Counts(family, config, shapes)
    found: list[Measure] = []

    def add(name: str, values: IntArray | FloatArray, limit: Limit) -> None:
        known = np.asarray(values, dtype=np.float64)
        found.append(Measure(name, known, limit.at_most, limit.at_least))

    if budget.params is not None:
        add("params", counts.params(), budget.params)
    if budget.non_embedding_params is not None:
        add("non_embedding_params", counts.non_embedding(), budget.non_embedding_params)
    if budget.active_params is not None:
        add("active_params", counts.active(), budget.active_params)
    if budget.memory is not None:
        memory, width = budget.memory, BYTES_OF[dtype]
        cached = counts.kv_values_per_token() * memory.batch * memory.context
        add("memory_bytes", width * (counts.params() + cached), memory.bytes)
    if budget.flops is not None:
        per_token = counts.flops_per_token(budget.flops.context)
        add("flops_per_token", per_token, budget.flops.per_token)
    if budget.speed is not None and table is not None:
        found.append(
            Measure("ms", predicted_ms(table, shapes, budget.speed), most_ms(budget.speed))
        )
    return tuple(found)


def most_ms(speed: Speed) -> float:
    """The longest that one batch of requests may take, whichever way the recipe says it."""
    if speed.ms is not None:
        return float(speed.ms)
    if speed.tokens_s is None:
        raise ValueError("a speed states ms or tokens_s")
    return float(1000 * speed.batch * speed.lengths[1] / speed.tokens_s)


class _Counts:
    """Counts of a family's rows on arrays of sizes."""

    def __init__(self, family: Family, config: Mapping[str, Any], shapes: Shapes) -> None:
        rows = family.rows(config, 0)
        layers = int(config[family.config_keys["layers"]])
        if any(family.rows(config, i) != rows for i in range(layers)):
            raise ParetronError(
                Problem(
                    Code.UNSUPPORTED,
                    "its layers are of several kinds, so that a count depends on which stay",
                    where="search.space",
                    fix="state the student's axes instead of a search",
                )
            )
        self._outside = family.rows(config, None)
        self._layer = rows
        self._size = shapes.sizes
        self._per_token = config.get(PER_TOKEN)

    def params(self) -> IntArray:
        layer = _sum(self._of(t) * self._experts(t) for t in self._layer)
        return self._size["layers"] * layer + _sum(self._of(t) for t in self._outside)

    def non_embedding(self) -> IntArray:
        ends = [t for t in self._outside if t.name.endswith(EMBEDDINGS)]
        return self.params() - _sum(self._of(t) for t in ends)

    def active(self) -> IntArray:
        layer = _sum(self._of(t) * self._routed(t) for t in self._layer)
        return self._size["layers"] * layer + _sum(self._of(t) for t in self._outside)

    def kv_values_per_token(self) -> IntArray:
        size = self._size
        return 2 * size["layers"] * size["kv_heads"] * size["head_dim"]

    def flops_per_token(self, context: int) -> IntArray:
        """Two a weight of every matrix and the head; attention sees half of the context."""
        size = self._size
        matrices = [t for t in self._layer if len(t.dims) == 2]
        layer = 2 * _sum(self._of(t) * self._routed(t) for t in matrices)
        heads = size["kv_heads"] * size["q_per_kv"]
        seen = 4 * size["layers"] * heads * size["head_dim"] * context // 2
        return size["layers"] * layer + 2 * size["vocab"] * size["hidden"] + seen

    def _of(self, row: Tensor) -> IntArray:
        """Parameters of one tensor of a row."""
        lengths: Any = row.shape(self._size)  # type: ignore[arg-type]  # of arrays, arrays
        values: IntArray = prod(lengths)
        return values

    def _experts(self, row: Tensor) -> IntArray | int:
        return self._size["experts"] if row.per_expert else 1

    def _routed(self, row: Tensor) -> int:
        return int(self._per_token or 1) if row.per_expert else 1


def _sum(counts: Iterable[IntArray]) -> IntArray:
    first, *others = counts
    total = first.copy()
    for more in others:
        total += more
    return total
