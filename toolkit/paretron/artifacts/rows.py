"""A stored tensor in blocks of rows, so that one of any size passes through little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from paretron.artifacts.headers import TensorEntry
from paretron.artifacts.passing import BLOCK_BYTES, blocks_of
from paretron.artifacts.tensors import check_finite, map_entry, torch_dtype
from paretron.errors import Code, ParetronError, Problem

if TYPE_CHECKING:
    import torch


def row_blocks(
    entry: TensorEntry, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, torch.Tensor]]:
    """Every row of a tensor in order: the first row's number, and rows [n, *shape[1:]].

    A block has about `block_bytes`, at least one row, and memory of its own. Every value is
    checked: INPUT_NONFINITE counts the NaN and Inf of the whole tensor; INPUT_TRUNCATED when the
    file has become shorter since its header was read.
    """
    import torch

    rows, rest = (entry.shape[0], entry.shape[1:]) if entry.shape else (1, ())
    dtype, where = torch_dtype(entry.dtype), f"{entry.file}: {entry.name}"
    if entry.nbytes == 0:
        yield 0, torch.empty(entry.shape, dtype=dtype)
        return
    row_bytes = entry.nbytes // rows
    at_once = max(1, block_bytes // row_bytes)
    first = 0
    for raw in blocks_of(
        entry.file,
        start=entry.start,
        end=entry.start + entry.nbytes,
        block_bytes=at_once * row_bytes,
    ):
        count, rest_bytes = divmod(raw.size, row_bytes)
        if rest_bytes:
            break
        block = torch.from_numpy(raw).view(dtype)
        try:
            check_finite(block, where)
        except ParetronError:
            check_finite(map_entry(entry), where)  # the same, counted over the whole tensor
            raise
        yield first, block.view(count, *rest) if entry.shape else block.view(())
        first += count
    if first < rows:
        raise _became_shorter(where)


def _became_shorter(where: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_TRUNCATED,
            "the file became shorter while it was read",
            where=where,
            fix="leave a model's files alone while they are read",
        )
    )
