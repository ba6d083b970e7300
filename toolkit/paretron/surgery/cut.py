"""Cutting a checkpoint's tensors as they pass by in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from paretron.artifacts.passing import BLOCK_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.artifacts.tensors import check_finite
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Tensor
from paretron.families import sizes as sizes_of
from paretron.recipe import Prune
from paretron.surgery.heads import givers, merged_slice
from paretron.surgery.postnorms import balanced_norm
from paretron.surgery.selection import Selection
from paretron.surgery.slicing import Index, Kept, dim_index, slice_tensor, take


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name, dtype and shape, and the source's tensor it is cut from.

    `layer` is its number in the source, `expert` its place among the experts that stay.
    """

    target: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    row: Tensor
    layer: int | None
    expert: int | None


class Cutter:
    """Reads, checks and slices pieces block by block.

    Memory held is a few blocks, whatever a tensor's size; but a layer's projection whose heads are
    merged is held whole, since its rows take from each other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        prune: Prune,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._checkpoint = checkpoint
        self._block_bytes = block_bytes
        self._sizes = sizes_of(checkpoint.family, checkpoint.config)
        self._selection = selection
        self._merge_heads = prune.merge_heads
        self._dtype: torch.dtype | None = getattr(torch, prune.dtype) if prune.dtype else None

    def blocks(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The rows of every piece in order, in blocks, in the dtype that is written."""
        for piece in pieces:
            for block in self._cut(piece):
                yield piece, self._cast(self._balanced(block, piece), piece).contiguous()

    def _cut(self, piece: Piece) -> Iterator[torch.Tensor]:
        kept = self._selection.kept(piece.layer, piece.expert)
        if piece.layer is not None and self._merge_heads:
            ranks = self._selection.head_ranks[piece.layer]
            if givers(piece.row, sizes=self._sizes, kept=kept, ranks=ranks) is not None:
                whole = self._checkpoint.read(piece.source)
                yield merged_slice(whole, piece.row, sizes=self._sizes, kept=kept, ranks=ranks)
                return
        rows, *others = (dim_index(d, sizes=self._sizes, kept=kept) for d in piece.row.dims)
        if not _ascending(rows):
            yield self._whole(piece, kept)
            return
        entry = self._checkpoint.entries[piece.source]
        for first, block in row_blocks(entry, block_bytes=self._block_bytes):
            part = take(block, 0, _inside(rows, first, first + len(block)))
            if len(part):
                for dim, index in enumerate(others, start=1):
                    part = take(part, dim, index)
                yield part

    def _balanced(self, block: torch.Tensor, piece: Piece) -> torch.Tensor:
        return balanced_norm(
            block,
            row=piece.row,
            source=piece.source,
            checkpoint=self._checkpoint,
            kept=self._selection.shared,
        )

    def _whole(self, piece: Piece, kept: Kept) -> torch.Tensor:
        tensor = self._checkpoint.read(piece.source)
        return slice_tensor(tensor, piece.row, sizes=self._sizes, kept=kept)

    def _cast(self, block: torch.Tensor, piece: Piece) -> torch.Tensor:
        """The block in the dtype asked for; GATE_NONFINITE when that cannot hold a value."""
        if self._dtype in (None, block.dtype):
            return block
        cast = block.to(self._dtype)
        try:
            check_finite(cast, piece.target)
        except ParetronError as error:
            raise ParetronError(
                Problem(
                    Code.GATE_NONFINITE,
                    f"values are too large for {str(self._dtype).removeprefix('torch.')}",
                    where=self._checkpoint.where(piece.source),
                    fix="set prune.dtype to bfloat16 or float32",
                )
            ) from error
        return cast


def _ascending(index: Index) -> bool:
    return not isinstance(index, torch.Tensor) or bool((index.diff() > 0).all())


def _inside(index: Index, first: int, end: int) -> Index:
    """What an ascending index selects of the rows from `first` to `end`, counted from `first`."""
    if index is None:
        return None
    if isinstance(index, slice):
        start, stop = (min(max(bound, first), end) for bound in (index.start, index.stop))
        return slice(start - first, stop - first)
    low, high = torch.searchsorted(index, torch.tensor([first, end])).tolist()
    return index[low:high] - first
