"""Which parts of a model can be trained alone: its norms, or the matrices of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.families.counts import expected_tensors, placed_tensors
from paretron.families.table import Family


def norm_parameters(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every norm's weight and bias, norms over queries and keys among them."""
    shapes = expected_tensors(family, config)
    # Nothing but a norm has a weight of one dimension.
    norms = {n.removesuffix("weight") for n, s in shapes.items() if len(s) == 1 and _weight(n)}
    return {n: s for n, s in shapes.items() if n.rpartition(".")[0] + "." in norms}


def layer_linears(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Module -> shape [out, in] of every linear in a layer that reads or writes `hidden`.

    Of a family with experts these are attention's: experts are no linears in memory, and peft takes
    the names of an MLP in their place for theirs.
    """
    shapes = expected_tensors(family, config)
    found = {}
    for place in placed_tensors(family, config):
        row = place.row
        if "experts" in family.config_keys and not any(
            "head_dim" in s for d in row.dims for s in d
        ):
            continue
        if row.per_layer and len(row.dims) == 2 and (("hidden",),) in row.dims:
            name = row.name.format(i=place.layer)
            found[name.removesuffix(".weight")] = shapes[name]
    return found


def _weight(name: str) -> bool:
    return name.endswith(".weight")
