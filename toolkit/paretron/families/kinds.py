"""Kinds of layers: which of a model's layers could stand for each other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from paretron.errors import Code, Problem
from paretron.families.table import Family, sizes


def layer_kinds(family: Family, config: Mapping[str, Any]) -> list[Hashable]:
    """What kind each layer is of; equal for layers that could stand for each other.

    Layers are of one kind when they have the same tensors and the same entry in every list of the
    config that has one a layer (full attention or a window, a rotary embedding or none).
    """
    lists = [v for k in family.per_layer_lists if isinstance(v := config.get(k), list)]
    layers = range(sizes(family, config)["layers"])
    return [(family.rows(config, i), *(values[i] for values in lists)) for i in layers]


def windowed_layers(family: Family, config: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers attend in a window, and its length in tokens; 0 layers where none does."""
    window = config.get("sliding_window")
    if window is None:
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return kinds.count("sliding_attention"), int(window)
    if family.full_attention_before:  # such a family says which layers do, or none does
        return 0, 0
    return sizes(family, config)["layers"], int(window)


def merging_problem(family: Family, config: Mapping[str, Any]) -> Problem | None:
    """Why the layers of a model cannot be merged: they are of several kinds."""
    kinds = set(layer_kinds(family, config))
    if len(kinds) == 1:
        return None
    return Problem(
        Code.UNSUPPORTED,
        f"the layers of this {family.model_type} are of {len(kinds)} kinds, which do not merge",
        where="prune.layers",
        fix="drop",
    )
