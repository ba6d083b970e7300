"""What follows from a table and a config without any weights: names, shapes, counts, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from paretron.families.table import Family, sizes

EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Counts:
    """Parameters of a model; `embedding` counts the input embedding and an untied lm_head."""

    total: int
    embedding: int

    @property
    def non_embedding(self) -> int:
        """Parameters outside of both embeddings."""
        return self.total - self.embedding


def expected_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor on disk, in execution order (embedding, layers, head)."""
    size = sizes(family, config)
    rows = [t for t in family.tensors if t.present(config)]
    shapes = {t: t.shape(size) for t in rows}
    first_layer_row = next(k for k, t in enumerate(rows) if t.per_layer)
    out = {t.name: shapes[t] for t in rows[:first_layer_row]}
    for i in range(size["layers"]):
        out.update({t.name.format(i=i): shapes[t] for t in rows if t.per_layer})
    out.update({t.name: shapes[t] for t in rows[first_layer_row:] if not t.per_layer})
    return out


def parameter_counts(family: Family, config: Mapping[str, Any]) -> Counts:
    """Exact parameter counts from the table, without listing every layer."""
    size = sizes(family, config)
    total = embedding = 0
    for row in family.tensors:
        if not row.present(config):
            continue
        count = prod(row.shape(size)) * (size["layers"] if row.per_layer else 1)
        total += count
        if row.name.endswith(EMBEDDINGS):
            embedding += count
    return Counts(total, embedding)


def kv_bytes_per_token(
    family: Family, config: Mapping[str, Any], *, bytes_per_value: int = 2
) -> int:
    """Bytes of key-value cache that one token of context takes over all layers."""
    size = sizes(family, config)
    return 2 * size["layers"] * size["kv_heads"] * size["head_dim"] * bytes_per_value
