"""Sums over all weights that carry a unit: where a unit lies in a tensor, the family table says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paretron.families import Family, Placed, Sizes, Tensor, sizes
from paretron.families.table import Dim

# Axis -> the table's axes of which one value each makes a unit.
_FACTORS = {
    "hidden": ("hidden",),
    "heads": ("kv_heads", "q_per_kv"),
    "kv_heads": ("kv_heads",),
    "ffn": ("ffn",),
    "experts": ("experts",),
    "moe_ffn": ("moe_ffn",),
}


class UnitSums:
    """Running sums of values given for every weight, one a unit: fp64 [places, units] by axis.

    A head is carried by the weights of its query and of the output projection that reads it, a KV
    group by those of all its heads, its key and its value, a neuron by its rows and columns, an
    expert by its whole matrices and its row of the router, a channel by every tensor of the stream.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._size: Sizes = sizes(family, config)
        layers = range(self._size["layers"])
        moe = [i for i in layers if any(t.per_expert for t in family.rows(config, i))]
        dense = [i for i in layers if i not in moe]
        self._place = {i: k for numbers in (moe, dense) for k, i in enumerate(numbers)}
        heads = self._size["kv_heads"] * self._size["q_per_kv"]
        shapes = {
            "hidden": (1, self._size["hidden"]),
            "heads": (len(layers), heads),
            "kv_heads": (len(layers), self._size["kv_heads"]),
        }
        if dense:
            shapes["ffn"] = (len(dense), self._size["ffn"])
        if moe:
            experts = self._size["experts"]
            shapes["experts"] = (len(moe), experts)
            shapes["moe_ffn"] = (len(moe) * experts, self._size["moe_ffn"])
        self.units = {a: torch.zeros(s, dtype=torch.float64) for a, s in shapes.items()}
        self._numbers: dict[tuple[Tensor, int, str], torch.Tensor] = {}

    def add(self, place: Placed, first: int, values: torch.Tensor) -> None:
        """Count a value for every weight of some rows of a tensor, from row `first` on; fp64."""
        values = values.cpu()
        for d in range(values.dim()):
            others = [k for k in range(values.dim()) if k != d]
            along = values.sum(others) if others else values
            start = first if d == 0 else 0
            for axis in self.units:
                numbers = self._units_along(place.row, d, axis)[start : start + len(along)]
                here = numbers >= 0
                if bool(here.any()):
                    into = self.units[axis][self._place_of(axis, place)]
                    into.index_add_(0, numbers[here], along[here])
        if place.expert is not None:
            self.units["experts"][self._place_of("experts", place), place.expert] += values.sum()

    def _place_of(self, axis: str, place: Placed) -> int:
        """The place of a tensor among those of an axis whose units it carries."""
        if axis == "hidden" or place.layer is None:
            return 0
        if axis in ("heads", "kv_heads"):
            return place.layer
        number = self._place[place.layer]
        return number * self._size["experts"] + (place.expert or 0) if axis == "moe_ffn" else number

    def _units_along(self, row: Tensor, d: int, axis: str) -> torch.Tensor:
        """The unit that every entry of a dimension belongs to, -1 for none."""
        key = (row, d, axis)
        if key not in self._numbers:
            factors = _FACTORS[axis]
            if axis == "heads" and self._size["q_per_kv"] == 1:
                factors = ("kv_heads",)  # keys and values are the head's own
            self._numbers[key] = unit_numbers(row.dims[d], factors, self._size)
        return self._numbers[key]


def unit_numbers(dim: Dim, factors: tuple[str, ...], sizes: Sizes) -> torch.Tensor:
    """For every entry of a dimension the number of its unit, int64; -1 in segments without one."""
    parts = []
    for segment in dim:
        number = torch.zeros((), dtype=torch.int64)
        for axis in segment:
            size = int(axis) if axis.isdigit() else sizes[axis]
            inside = torch.arange(size) if axis in factors else torch.zeros(size, dtype=torch.int64)
            number = number.unsqueeze(-1) * (size if axis in factors else 1) + inside
        carried = all(f in segment for f in factors)
        parts.append(number.flatten() if carried else torch.full((number.numel(),), -1))
    return torch.cat(parts)
