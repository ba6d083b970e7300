"""What follows from a table and a config without any weights: names, shapes, counts, bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

from paretron.families.experts import PER_TOKEN
from paretron.families.table import Family, Tensor, sizes

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model; `embedding` counts the input embedding and an untied lm_head.

    `active` counts those that one token passes: of the experts, as many as it is routed to.
    """

    total: int
    embedding: int
    active: int

    @property
    def non_embedding(self) -> int:
        """Parameters outside of both embeddings."""
        return self.total - self.embedding


@dataclass(frozen=True)
class Placed:
    """One tensor on disk: a row of the table, in one layer and one expert where it has them."""

    row: Tensor
    layer: int | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.row.name.format(i=self.layer, e=self.expert)


def placed_tensors(family: Family, config: Mapping[str, Any]) -> Iterator[Placed]:
    """Every tensor of a model in execution order: embedding, layers, final norm and head."""
    size = sizes(family, config)
    outside = family.rows(config, None)
    before = family.tensors.index(next(t for t in family.tensors if t.per_layer))
    yield from (Placed(t) for t in outside if family.tensors.index(t) < before)
    for i in range(size["layers"]):
        for per_expert, rows in groupby(family.rows(config, i), key=lambda t: t.per_expert):
            together = tuple(rows)
            for e in range(size["experts"]) if per_expert else (None,):
                yield from (Placed(t, i, e) for t in together)
    yield from (Placed(t) for t in outside if family.tensors.index(t) > before)


def expected_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor on disk, in execution order (embedding, layers, head)."""
    size = sizes(family, config)
    shapes = {t: t.shape(size) for t in _present(family, config, size["layers"])}
    return {p.name: shapes[p.row] for p in placed_tensors(family, config)}


def parameter_counts(family: Family, config: Mapping[str, Any]) -> Counts:
    """Exact parameter counts from the table, without listing every tensor."""
    size = sizes(family, config)
    total = embedding = active = 0
    for row, layers in _present(family, config, size["layers"]).items():
        count = layers * prod(row.shape(size))
        total += count * (size["experts"] if row.per_expert else 1)
        active += count * (config[PER_TOKEN] if row.per_expert else 1)
        if row.name.endswith(EMBEDDINGS):
            embedding += count
    return Counts(total, embedding, active)


def active_matrix_weights(family: Family, config: Mapping[str, Any]) -> int:
    """Weights of the layers' matrices that one token is multiplied with."""
    size = sizes(family, config)
    return sum(
        layers * prod(row.shape(size)) * (config[PER_TOKEN] if row.per_expert else 1)
        for row, layers in _present(family, config, size["layers"]).items()
        if row.per_layer and len(row.dims) == 2
    )


def _present(family: Family, config: Mapping[str, Any], layers: int) -> dict[Tensor, int]:
    """The rows that a model has, and in how many layers; 1 for those outside of the layers."""
    found = dict.fromkeys(family.rows(config, None), 1)
    for i in range(layers):
        for row in family.rows(config, i):
            found[row] = found.get(row, 0) + 1
    return found


def kv_bytes_per_token(
    family: Family, config: Mapping[str, Any], *, bytes_per_value: int = 2
) -> int:
    """Bytes of key-value cache that one token of context takes over all layers."""
    size = sizes(family, config)
    return 2 * size["layers"] * size["kv_heads"] * size["head_dim"] * bytes_per_value
