"""Cutting a checkpoint's tensors as they pass by in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.passing import BLOCK_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.tensors import check_finite
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Placed, Tensor
from paretron.families import sizes as sizes_of
from paretron.recipe import Prune
from paretron.surgery.heads import givers, merged_slice
from paretron.surgery.layers import LayerReader
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
        self._reader = LayerReader(checkpoint, selection.layers, merge=prune.layers == "merge")

    def blocks(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The rows of every piece in order, in blocks, in the dtype that is written."""
        for piece in pieces:
            for block in self._cut(piece):
                computed = self._balanced(block, piece)
                made = computed is not block or self._reader.merges(self._place(piece))
                yield piece, self._cast(computed, piece, made=made).contiguous()

    def _cut(self, piece: Piece) -> Iterator[torch.Tensor]:
        kept = self._selection.kept(piece.layer, piece.expert)
        if piece.layer is not None and self._merge_heads:
            ranks = self._selection.head_ranks[piece.layer]
            if givers(piece.row, sizes=self._sizes, kept=kept, ranks=ranks) is not None:
                whole = self._reader.read(self._place(piece))
                merged = merged_slice(whole, piece.row, sizes=self._sizes, kept=kept, ranks=ranks)
                where = self._checkpoint.where(piece.source)
                _representable(merged, where, fix="set prune.merge_heads to false")
                yield merged
                return
        rows, *others = (dim_index(d, sizes=self._sizes, kept=kept) for d in piece.row.dims)
        if not _ascending(rows):
            yield self._whole(piece, kept)
            return
        place = self._place(piece)
        for first, block in self._reader.blocks(place, block_bytes=self._block_bytes):
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
        tensor = self._reader.read(self._place(piece))
        return slice_tensor(tensor, piece.row, sizes=self._sizes, kept=kept)

    def _place(self, piece: Piece) -> Placed:
        expert = self._selection.source_expert(piece.layer, piece.expert)
        return Placed(piece.row, piece.layer, expert)

    def _cast(self, block: torch.Tensor, piece: Piece, *, made: bool) -> torch.Tensor:
        """The block in the dtype that is written; GATE_NONFINITE when that cannot hold a value.

        What was only cut was checked when it was read; `made` by arithmetic, it is checked here.
        """
        cast = block.to(getattr(torch, DTYPE_NAMES[piece.dtype]))
        if made or cast is not block:
            where = self._checkpoint.where(piece.source)
            _representable(cast, where, fix="set prune.dtype to bfloat16 or float32")
        return cast


def _representable(made: torch.Tensor, where: str, *, fix: str) -> None:
    try:
        check_finite(made, where)
    except ParetronError as error:
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"values are too large for {str(made.dtype).removeprefix('torch.')}",
                where=where,
                fix=fix,
            )
        ) from error


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
