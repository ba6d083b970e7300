"""Layers merged instead of dropped: what stays takes over how the removed ones differ from it.

LaCo (arXiv 2402.11187, section 2.2) merges the m layers after layer l into it:

    theta*_l = theta_l + sum over k = 1 .. m of (theta_{l+k} - theta_l)

for the matrices and biases of attention and MLP; its norms stay those of layer l. Which layers go
is decided by `score.depth`, not by LaCo's search. Removed layers before the first one that stays
are merged into that one, by the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paretron.artifacts.passing import BLOCK_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.artifacts.tensors import check_finite
from paretron.families import Placed, Tensor, sizes


class LayerReader:
    """Reads a layer's tensors from a checkpoint, with those of removed layers merged into them.

    `kept` are the layers that stay; without `merge`, what goes leaves nothing.
    """

    def __init__(self, checkpoint: Checkpoint, kept: tuple[int, ...], *, merge: bool) -> None:
        self._checkpoint = checkpoint
        self._merged = merged_into(kept, sizes(checkpoint.family, checkpoint.config)["layers"])
        self._merge = merge

    def merges(self, place: Placed) -> bool:
        """Whether anything is merged into the tensor at this place."""
        inside = place.layer is not None and bool(self._merged[place.layer])
        return self._merge and inside and not _is_norm(place.row)

    def read(self, place: Placed) -> torch.Tensor:
        """The tensor, as stored; merged, in fp32."""
        if not self.merges(place):
            return self._checkpoint.read(place.name)
        return torch.cat([block for _, block in self.blocks(place)])

    def blocks(
        self, place: Placed, *, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The same in blocks of rows, each with its first row's number."""
        entry = self._checkpoint.entries[place.name]
        for first, block in row_blocks(entry, block_bytes=block_bytes):
            yield first, self._with_others(place, first, block) if self.merges(place) else block

    def _with_others(self, place: Placed, first: int, block: torch.Tensor) -> torch.Tensor:
        own = block.float()
        total = own.clone()
        for layer in self._merged[place.layer or 0]:
            name = Placed(place.row, layer, place.expert).name
            other = self._checkpoint.map(name)[first : first + len(block)]
            check_finite(other, self._checkpoint.where(name))
            total += other.float() - own
        return total


def merged_into(kept: tuple[int, ...], total: int) -> dict[int, tuple[int, ...]]:
    """For every layer that stays the removed ones up to the next; the first takes those before."""
    ends = (*kept[1:], total)
    found = {layer: tuple(range(layer + 1, end)) for layer, end in zip(kept, ends, strict=True)}
    found[kept[0]] = (*range(kept[0]), *found[kept[0]])
    return found


def _is_norm(row: Tensor) -> bool:
    return row.name.rpartition(".")[0].endswith("norm")
