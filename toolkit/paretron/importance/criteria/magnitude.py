"""The criterion `magnitude`: how large the weights of a unit are."""

from __future__ import annotations

import torch

from paretron.artifacts.rows import row_blocks
from paretron.families import placed_tensors, sizes
from paretron.importance.criteria.material import Importance, Material
from paretron.importance.criteria.units import UnitSums


def magnitude(material: Material) -> Importance:
    """The L2 norm of all weights that carry a unit, as stored; of a layer, the sum of |w|.

    Tensors are read in blocks of rows: neither the model nor a sample is needed. (Units: Li et al.,
    "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, over a whole group of tensors as in
    LLM-Pruner, arXiv 2305.11627; layers: "Mag" of Shortened LLaMA, arXiv 2402.02834, without its
    rule that some first and last layers always stay.)
    """
    checkpoint = material.checkpoint
    family, config = checkpoint.family, checkpoint.config
    squares = UnitSums(family, config)
    layers = torch.zeros(sizes(family, config)["layers"], dtype=torch.float64)
    for place in placed_tensors(family, config):
        for first, block in row_blocks(checkpoint.entries[place.name]):
            weights = block.double()
            squares.add(place, first, weights.square())
            if place.layer is not None:
                layers[place.layer] += weights.abs().sum()
    return Importance({axis: s.sqrt() for axis, s in squares.units.items()}, layers)
