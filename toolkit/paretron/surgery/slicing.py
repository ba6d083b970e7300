"""Which entries of a tensor remain when some units of its axes are kept.

A dimension is read from the family's table: axes that are factors of a segment nest, outermost
first, and segments follow each other. Units may be listed in any order, so that a permutation is
a selection too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from paretron.families import Sizes, Tensor
from paretron.families.table import Dim, Segment

# Axis -> kept units in the order they will have, int64. Shape [n]; an axis whose kept units
# depend on the unit of the axis before it in the table (query heads inside their KV group) has
# shape [kept of that axis, n]. Axes that are not named are kept whole.
Kept = Mapping[str, torch.Tensor]
Index = slice | torch.Tensor | None  # None: everything, in order


def slice_tensor(tensor: torch.Tensor, row: Tensor, *, sizes: Sizes, kept: Kept) -> torch.Tensor:
    """The kept entries of a tensor with the table row's dimensions; a view where possible.

    Outer dimensions are cut first, so rows that go are never read.
    """
    for d, dim in enumerate(row.dims):
        tensor = take(tensor, d, dim_index(dim, sizes=sizes, kept=kept))
    return tensor


def dim_index(dim: Dim, *, sizes: Sizes, kept: Kept) -> Index:
    """The entries of one dimension that remain: None for all, a slice for a range."""
    if not any(axis in kept for segment in dim for axis in segment):
        return None
    parts, offset = [], 0
    for segment in dim:
        parts.append(segment_index(segment, sizes=sizes, kept=kept) + offset)
        offset += _length(segment, sizes)
    return _simplest(torch.cat(parts), length=offset)


def segment_index(segment: Segment, *, sizes: Sizes, kept: Kept) -> torch.Tensor:
    """Positions inside one segment of nested axes, int64 in the order they will have."""
    index = torch.zeros((), dtype=torch.int64)
    for axis in segment:
        size = int(axis) if axis.isdigit() else sizes[axis]
        units = kept.get(axis, torch.arange(size))
        index = index.unsqueeze(-1) * size + units
    return index.flatten()


def take(tensor: torch.Tensor, dim: int, index: Index) -> torch.Tensor:
    """The entries `index` of one dimension."""
    if index is None:
        return tensor
    if isinstance(index, slice):
        return tensor.narrow(dim, index.start, index.stop - index.start)
    if dim == 0:
        return tensor.index_select(0, index)
    # Several times faster than index_select for columns; the bits need no arithmetic.
    bits = tensor.view(_BITS[tensor.dtype.itemsize]).numpy()
    return torch.from_numpy(np.take(bits, index.numpy(), axis=dim, mode="clip")).view(tensor.dtype)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _length(segment: Segment, sizes: Sizes) -> int:
    length = 1
    for axis in segment:
        length *= int(axis) if axis.isdigit() else sizes[axis]
    return length


def _simplest(index: torch.Tensor, *, length: int) -> Index:
    first, count = int(index[0]), len(index)
    if not torch.equal(index, torch.arange(first, first + count)):
        return index
    return None if count == length else slice(first, first + count)
