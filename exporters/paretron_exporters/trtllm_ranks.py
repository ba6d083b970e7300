"""The weights of a TensorRT-LLM checkpoint: one file a rank, written in blocks of rows.

The files of the ranks that share a layer are written together, so that the source is read once,
and no more than a few blocks are in memory whatever the size of a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from paretron.artifacts.headers import DTYPE_BYTES, TensorEntry
from paretron.artifacts.passing import BLOCK_BYTES
from paretron.artifacts.reader import SINGLE, Checkpoint
from paretron.artifacts.tensors import check_finite, map_entry, torch_dtype
from paretron.artifacts.writer import TensorWriter
from paretron_exporters.exporter import OnEvent
from paretron_exporters.hf_weights import cast
from paretron_exporters.trtllm_layout import Layout, Piece, Target, rank_targets
from paretron_exporters.trtllm_scales import Scales, to_fp8

FP8 = "F8_E4M3"
# Stage, name, and the entries of each of its ranks: the tensor's, and those of its scales.
See = Callable[[int, str, Sequence[Mapping[str, TensorEntry]]], None]


def stage_targets(checkpoint: Checkpoint, layout: Layout, stage: int) -> list[tuple[Target, ...]]:
    """The tensors of a pipeline stage, each as the ranks that share its layers hold it."""
    ranks = range(layout.tensor_parallel)
    of = (
        rank_targets(checkpoint.family, checkpoint.config, layout, stage=stage, rank=rank)
        for rank in ranks
    )
    return list(zip(*of, strict=True))


def planned(target: Target, *, dtype: str, fp8: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of a tensor and of its scales, in the order written."""
    if not (fp8 and target.scaled):
        return {target.name: (dtype, target.shape)}
    return {target.name: (FP8, target.shape), **dict.fromkeys(target.scale_names, ("F32", (1,)))}


def write_ranks(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    layout: Layout,
    dtype: str,
    scales: Scales | None,
    digests: dict[str, str],
    see: See,
    on_event: OnEvent,
) -> None:
    """Write every rank's file in a safetensors dtype; `digests` gets their sha256.

    `see` is called with each tensor as soon as all ranks of its stage have it. GATE_NONFINITE for
    a value that the dtype cannot hold.
    """
    stages = [stage_targets(checkpoint, layout, s) for s in range(layout.pipeline_parallel)]
    done, total = 0, sum(map(len, stages))
    for stage, tensors in enumerate(stages):
        sums: list[dict[str, str]] = [{} for _ in range(layout.tensor_parallel)]
        with ExitStack() as open_files:
            writers = []
            for rank in range(layout.tensor_parallel):
                place = folder / layout.file(stage, rank).removesuffix(".safetensors")
                place.mkdir()
                plan: dict[str, tuple[str, tuple[int, ...]]] = {}
                for ranks in tensors:
                    plan |= planned(ranks[rank], dtype=dtype, fp8=scales is not None)
                writer = TensorWriter(place, plan, max_shard_bytes=sys.maxsize, digests=sums[rank])
                writers.append(open_files.enter_context(writer))
            for ranks in tensors:
                _write(checkpoint, writers, ranks, dtype=dtype, scales=scales)
                made = [
                    _entries(writer, planned(target, dtype=dtype, fp8=scales is not None))
                    for writer, target in zip(writers, ranks, strict=True)
                ]
                see(stage, ranks[0].name, made)
                done += 1
                on_event("progress", {"done": done, "total": total, "unit": "tensors"})
        for rank, found in enumerate(sums):
            name = layout.file(stage, rank)
            place = folder / name.removesuffix(".safetensors")
            (place / SINGLE).rename(folder / name)
            place.rmdir()
            digests[name] = found[SINGLE]


def _write(
    checkpoint: Checkpoint,
    writers: Sequence[TensorWriter],
    ranks: Sequence[Target],
    *,
    dtype: str,
    scales: Scales | None,
) -> None:
    """One tensor of the format, for all ranks of its layer."""
    scaled = scales is not None and ranks[0].scaled
    scale = scales.weights[ranks[0].scaled] if scales is not None and scaled else None

    def put(writer: TensorWriter, target: Target, values: torch.Tensor, where: str) -> None:
        values = converted(values, dtype, added=target.added, where=where)
        writer.write(target.name, values if scale is None else to_fp8(values, scale))

    if all(piece.columns for target in ranks for piece in target.pieces):
        (piece,) = ranks[0].pieces
        for block in source_blocks(checkpoint, piece):
            for writer, target in zip(writers, ranks, strict=True):
                columns = target.pieces[0].columns
                assert columns is not None  # just asked
                part = block[:, columns.start : columns.stop]
                put(writer, target, part, checkpoint.where(piece.name))
    else:
        for writer, target in zip(writers, ranks, strict=True):
            for piece in target.pieces:
                for block in source_blocks(checkpoint, piece):
                    put(writer, target, block, checkpoint.where(piece.name))
            if target.padding:
                zeros = torch.zeros(target.padding, *target.shape[1:], dtype=torch_dtype(dtype))
                writer.write(target.name, zeros)
    if scales is not None and scaled:
        pair = (scales.weights[ranks[0].scaled], scales.inputs[ranks[0].scaled])
        for writer, target in zip(writers, ranks, strict=True):
            for name, value in zip(target.scale_names, pair, strict=True):
                writer.write(name, torch.tensor([value]))


def _entries(
    writer: TensorWriter, plan: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, TensorEntry]:
    """Where the tensors that were just written lie."""
    return {
        name: TensorEntry(name, dtype, shape, *writer.place(name), prod(shape) * DTYPE_BYTES[dtype])
        for name, (dtype, shape) in plan.items()
    }


def source_blocks(checkpoint: Checkpoint, piece: Piece) -> Iterator[torch.Tensor]:
    """The rows of a piece, with all of their columns, in blocks; every value is a number.

    They stay in the page cache, for who compares them with what was written.
    """
    entry = checkpoint.entries[piece.name]
    at_once = max(1, BLOCK_BYTES * entry.shape[0] // max(1, entry.nbytes))
    for first in range(piece.rows.start, piece.rows.stop, at_once):
        some = range(first, min(first + at_once, piece.rows.stop))
        block = map_entry(rows_of(entry, some))
        check_finite(block, checkpoint.where(piece.name))
        yield block


def rows_of(entry: TensorEntry, rows: range) -> TensorEntry:
    """The entry of some rows of a stored tensor."""
    row_bytes = entry.nbytes // entry.shape[0]
    return replace(
        entry,
        shape=(len(rows), *entry.shape[1:]),
        start=entry.start + rows.start * row_bytes,
        nbytes=len(rows) * row_bytes,
    )


def converted(values: torch.Tensor, dtype: str, *, added: float, where: str) -> torch.Tensor:
    """Values in a safetensors dtype, `added` to each of them first in float32."""
    return cast(values.float() + added if added else values, dtype, where=where)
