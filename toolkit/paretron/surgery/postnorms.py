"""Keeping embeddings and what layers write in proportion when channels of the stream go.

Where a norm is over what a matrix writes into the residual stream (Gemma, OLMo 2), it divides by
the root mean square over all channels. Of `old` channels `new` stay, c = sqrt(new / old), and they
hold a share f of the written energy: over them alone the root mean square is sqrt(f) / c times what
it was, so every write would come out c / sqrt(f) times as large. The stream, meanwhile, keeps its
embeddings as they are, or times c where they are multiplied by sqrt(hidden). Writes stay in
proportion when the norm's factor (its weight plus the family's offset) is multiplied by

    sqrt(f) / c,    or sqrt(f) where embeddings shrink by c.

The embedding itself is not touched, so a tied head stays what it is. f is taken from the matrix
that writes, its inputs as if they were uncorrelated and of one size: the squared norm of the kept
rows over that of all. Were all channels alike, f would be c^2; were the pruned ones silent, 1.
"""

from __future__ import annotations

import math

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.families import Tensor
from paretron.surgery.slicing import Kept


def balanced_norm(
    weight: torch.Tensor, *, row: Tensor, source: str, checkpoint: Checkpoint, kept: Kept
) -> torch.Tensor:
    """A norm's weight after slicing, all of it or a block, so that writes stay in proportion.

    `source` is its name in the checkpoint, `kept` the units that stay. Other tensors than a norm
    over writes, and widths that lose nothing, come back as they are. Computed in fp64.
    """
    matrix = _written_by(row, source, checkpoint)
    if matrix is None or "hidden" not in kept:
        return weight
    energy, channels = _row_energy(checkpoint, matrix), kept["hidden"]
    if len(channels) == len(energy) or not float(energy.sum()):
        return weight
    factor = math.sqrt(float(energy[channels].sum() / energy.sum()))
    if not checkpoint.family.embedding_scale_by_hidden:
        factor /= math.sqrt(len(channels) / len(energy))
    offset = checkpoint.family.norm_offset
    return (factor * (weight.double() + offset) - offset).to(weight.dtype)


def _written_by(row: Tensor, source: str, checkpoint: Checkpoint) -> str | None:
    """The matrix whose writes the norm is over, by name in the checkpoint."""
    for matrix, norm in checkpoint.family.post_norms:
        if row.name.endswith(norm):
            return source.removesuffix(norm) + matrix
    return None


def _row_energy(checkpoint: Checkpoint, matrix: str) -> torch.Tensor:
    """The squared norm of every row, fp64 [rows]."""
    blocks = row_blocks(checkpoint.entries[matrix])
    return torch.cat([block.double().square().sum(1) for _, block in blocks])
