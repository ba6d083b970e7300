"""The criterion `random`: what every other one has to beat."""

from __future__ import annotations

import hashlib

import torch

from paretron.families import sizes
from paretron.importance.criteria.material import Importance, Material
from paretron.importance.criteria.units import UnitSums


def random(material: Material) -> Importance:
    """Independent draws from [0, 1) for every unit and layer, fixed by seed, axis and place.

    A KV group is the sum of its heads, as for activations, so both agree where they are one.
    """
    family, config = material.checkpoint.family, material.checkpoint.config
    shapes = {axis: found.shape for axis, found in UnitSums(family, config).units.items()}
    del shapes["kv_heads"]
    units = {
        axis: torch.stack([_draws(material.seed, axis, place, count) for place in range(places)])
        for axis, (places, count) in shapes.items()
    }
    return Importance(units, _draws(material.seed, "layers", 0, sizes(family, config)["layers"]))


def _draws(seed: int, axis: str, place: int, count: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{axis}/{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)
