"""A student's tensors, made of its teacher's: cut, folded, rotated, read through a fitted map.

With a rotation every norm's weight is folded into the matrices that read it, and the residual
stream x becomes B x: embedding and writers give it, readers and head take it. Without one, channels
are chosen as in plain trimming.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.compensate.residual import Half, final_norm, half_of, halves, role_of
from paretron.families import Placed, Sizes, Tensor, placed_tensors
from paretron.families import sizes as sizes_of
from paretron.surgery.heads import merged_slice
from paretron.surgery.layers import LayerReader
from paretron.surgery.selection import Selection
from paretron.surgery.slicing import Kept, slice_tensor


@dataclass(frozen=True)
class Coordinates:
    """The student's residual stream in terms of the teacher's: B x, some channels, or all.

    `basis` is [K, D] with orthonormal rows, `channels` int64 [K]; at most one of them is there.
    """

    basis: torch.Tensor | None = None
    channels: torch.Tensor | None = None

    def of(self, stream: torch.Tensor) -> torch.Tensor:
        """[..., K] from [..., D]."""
        if self.basis is not None:
            return stream @ self.basis.to(stream).T
        return stream if self.channels is None else stream[..., self.channels.to(stream.device)]


class Trimmed:
    """The student of a selection; `config` is its own, with its teacher's keys otherwise."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        config: Mapping[str, Any],
        *,
        basis: torch.Tensor | None,
        merge_heads: bool,
        merge_layers: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.selection = selection
        self.config = config
        self.size: Sizes = sizes_of(self.family, config)
        self.rotated = basis is not None
        shared = dict(selection.shared)
        channels = shared.pop("hidden", None)
        self.coordinates = Coordinates(basis, None if self.rotated else channels)
        self._shared: Kept = shared
        self._sizes = sizes_of(self.family, checkpoint.config)
        self._merge_heads = merge_heads
        self._reader = LayerReader(checkpoint, selection.layers, merge=merge_layers)

    def halves(self, layer: int) -> tuple[Half, Half]:
        """The halves of a layer, by its number in the teacher."""
        return halves(self.family, self.checkpoint.config, layer)

    def half(self, new: int, number: int) -> dict[str, torch.Tensor]:
        """Every tensor of half of the student's layer `new` under its name on disk, in fp32."""
        both = self.halves(self.selection.layers[new])
        return {
            place.name: self._tensor(place)
            for place in self._places(new)
            if self._half_of(both, place.row) == number
        }

    def readers(
        self, new: int, half: int, map_DK: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What reads the norm of half a layer, through a map from the student's norm's output."""
        old = self.selection.layers[new]
        rows = self.halves(old)[half].readers
        for place in self._places(new):
            if place.row in rows:
                yield place.name, self._cut(place, old) @ map_DK.cpu()

    def norm(self, row: Tensor, layer: int | None, *, scale: float) -> torch.Tensor:
        """A norm's weight: the fitted scale where the weight itself was folded away."""
        if self.rotated:
            value = scale - self.family.norm_offset
            return torch.full((self.size["hidden"],), value, dtype=torch.float32)
        return self.coordinates.of(self._read(row.name.format(i=layer)))

    def norm_bias(self, row: Tensor, layer: int | None, *, absorbed: bool) -> torch.Tensor:
        """A norm's bias: none where its readers have taken it over."""
        bias = self._read(row.name.format(i=layer))
        if not self.rotated:
            return self.coordinates.of(bias)
        if absorbed:
            return torch.zeros(self.size["hidden"])
        # Readers see weight * (x + bias / weight): that is what is rotated. Where channels go, what
        # of it lies outside of the kept directions goes too.
        weight = self.gamma(row.name.removesuffix("bias") + "weight", layer)
        return self.coordinates.of(torch.where(weight == 0, 0.0, bias / weight))

    def gamma(self, name: str, layer: int | None) -> torch.Tensor:
        """What the teacher's norm multiplies by."""
        return self._read(name.format(i=layer)) + self.family.norm_offset

    def reader_map(self, row: Tensor, layer: int | None) -> torch.Tensor:
        """What trimming alone has a norm's readers see, as a map [D, K] from the norm's output."""
        gamma = self.gamma(row.name, layer)
        identity = self.coordinates.of(torch.eye(len(gamma)))
        return gamma[:, None] * identity if self.rotated else identity

    def embedding(self) -> Iterator[torch.Tensor]:
        """The embedding in blocks of rows, fp32 [n, K]."""
        for block in self._row_blocks("embedding"):
            yield self.coordinates.of(block)

    def embedded(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The TEACHER's embedding of some tokens, fp32 [B, T, D]; only their rows are read."""
        row = next(t for t in self.family.tensors if role_of(self.family, t) == "embedding")
        return self.checkpoint.map(row.name)[ids_BT.cpu()].float()

    def head(self, map_DK: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The heads in blocks of rows: the teacher's [n, D] and the student's [n, K], fp32.

        `map_DK` as for readers. Of a tied student the second is its embedding: nothing to fit.
        """
        fold = self.rotated
        gamma = self.gamma(final_norm(self.family).name, None) if fold else torch.ones(())
        for block in self._row_blocks("head"):
            yield (
                block,
                self.coordinates.of(block * gamma) if map_DK is None else (block @ map_DK.cpu()),
            )

    def _half_of(self, both: tuple[Half, Half], row: Tensor) -> int:
        """Norms of query and key, which neither read the stream nor write it, are attention's."""
        return half_of(both, row) if role_of(self.family, row) else 0

    def _places(self, new: int) -> list[Placed]:
        return [p for p in placed_tensors(self.family, self.config) if p.layer == new]

    def _tensor(self, place: Placed) -> torch.Tensor:
        assert place.layer is not None  # what lies outside of the layers has functions of its own
        old = self.selection.layers[place.layer]
        row, both = place.row, self.halves(old)
        role = role_of(self.family, row)
        if role == "norm":
            return self.norm(row, old, scale=1.0)
        k = self._half_of(both, row)
        if role == "norm_bias":
            return self.norm_bias(row, old, absorbed=both[k].absorbs)
        cut = self._cut(place, old)
        if role == "reader":
            fold = self.gamma(both[k].norm.name, old) if self.rotated else torch.ones(())
            return self.coordinates.of(cut * fold)
        if role == "writer":
            return self.coordinates.of(cut.T).T.contiguous()
        if role == "writer_bias":
            return self.coordinates.of(cut)
        if role == "reader_bias" and self.rotated and both[k].absorbs:
            weight = Placed(self._beside(row, "weight"), place.layer, place.expert)
            norm_bias = self._read(self._beside(both[k].norm, "bias").name.format(i=old))
            return cut + self._cut(weight, old) @ norm_bias
        return cut

    def _cut(self, place: Placed, old: int) -> torch.Tensor:
        """The kept entries of a layer's tensor in fp32, every channel of the stream included."""
        kept = {
            **self._shared,
            **{k: v for k, v in self.selection.kept(old, place.expert).items() if k != "hidden"},
        }
        source = Placed(place.row, old, self.selection.source_expert(old, place.expert))
        tensor = self._reader.read(source).float()
        if not self._merge_heads:
            return slice_tensor(tensor, place.row, sizes=self._sizes, kept=kept)
        return merged_slice(
            tensor,
            place.row,
            sizes=self._sizes,
            kept=kept,
            ranks=self.selection.head_ranks[old],
        )

    def _beside(self, row: Tensor, what: str) -> Tensor:
        name = f"{row.name.rpartition('.')[0]}.{what}"
        return next(t for t in self.family.tensors if t.name == name)

    def _read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name).float()

    def _row_blocks(self, role: str) -> Iterator[torch.Tensor]:
        """A matrix over the vocabulary; a tied head is the embedding."""
        tied = bool(self.checkpoint.config.get("tie_word_embeddings", False))
        wanted = "embedding" if role == "head" and tied else role
        row = next(t for t in self.family.tensors if role_of(self.family, t) == wanted)
        for _, block in row_blocks(self.checkpoint.entries[row.name]):
            yield block.float()
