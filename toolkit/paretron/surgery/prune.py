"""The prune stage: read a tensor, slice it, write it, with reading ahead on one thread.

No model is ever built. What is held at a time is the tensor being written, one that is ready and
one being sliced, whatever the checkpoint's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.manifest import MANIFEST, Provenance, identity
from paretron.artifacts.models import write_companions
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import refuse_overlap, staged
from paretron.artifacts.writer import Layout, TensorWriter
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Sizes, Tensor, expected_tensors
from paretron.families import sizes as sizes_of
from paretron.families.table import with_sizes
from paretron.importance.scores import Scores
from paretron.recipe import Prune, Score
from paretron.surgery.ahead import read_ahead
from paretron.surgery.heads import merged_slice
from paretron.surgery.selection import Selection, choose
from paretron.surgery.slicing import slice_tensor

OnEvent = Callable[[str, Mapping[str, object]], None]


def prune(
    model: Path,
    scores: Path,
    *,
    sizes: Sizes,
    prune: Prune,
    score: Score,
    out: Path,
    provenance: Provenance,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Cut a checkpoint to the target `sizes` by its scores; `out` is a Hugging Face repository.

    Errors: RECIPE_TARGET, RUN_MISMATCH when the scores are another model's, and those of reading
    and writing.
    """
    refuse_overlap(out, model)
    checkpoint = Checkpoint.open(model)
    loaded = Scores.load(scores)
    _same_model(checkpoint, loaded)
    selection = choose(loaded, sizes=sizes, score=score)
    with staged(out, provenance=provenance, overwrite=overwrite) as folder:
        write_pruned(checkpoint, selection, folder, sizes=sizes, prune=prune, on_event=on_event)


def write_pruned(
    checkpoint: Checkpoint,
    selection: Selection,
    folder: Path,
    *,
    sizes: Sizes,
    prune: Prune,
    on_event: OnEvent = lambda kind, fields: None,
) -> None:
    """Write what a selection keeps of a checkpoint, config and tokenizer included."""
    whole = len(selection.layers) == sizes_of(checkpoint.family, checkpoint.config)["layers"]
    config = with_sizes(
        checkpoint.family,
        checkpoint.config,
        sizes,
        kept_layers=None if whole else selection.layers,
    )
    pieces = list(_pieces(checkpoint, selection, config, prune))
    layout: Layout = {p.target: (p.dtype, p.shape) for p in pieces}
    dtype = prune.dtype or DTYPE_NAMES[checkpoint.dtype]
    servable = servable_config(config, dtype=dtype)  # refuses before anything is written
    cut = _Cut(checkpoint, selection, prune)
    limit = int(prune.max_shard_gb * 1e9)
    with TensorWriter(folder, layout, max_shard_bytes=limit) as writer:
        for done, (piece, tensor) in enumerate(read_ahead(cut, pieces), start=1):
            writer.write(piece.target, tensor)
            on_event("progress", {"done": done, "total": len(pieces), "unit": "tensors"})
    write_companions(folder, config=servable, source=checkpoint.path)


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name, dtype and shape, and the source's tensor it is cut from."""

    target: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    row: Tensor
    layer: int | None


class _Cut:
    """Reads and slices one piece."""

    def __init__(self, checkpoint: Checkpoint, selection: Selection, prune: Prune) -> None:
        self._checkpoint = checkpoint
        self._sizes = sizes_of(checkpoint.family, checkpoint.config)
        self._selection = selection
        self._merge_heads = prune.merge_heads
        self._dtype: torch.dtype | None = getattr(torch, prune.dtype) if prune.dtype else None

    def __call__(self, piece: Piece) -> torch.Tensor:
        tensor = self._checkpoint.read(piece.source)
        kept = self._selection.kept(piece.layer)
        if piece.layer is not None and self._merge_heads:
            ranks = self._selection.head_ranks[piece.layer]
            cut = merged_slice(tensor, piece.row, sizes=self._sizes, kept=kept, ranks=ranks)
        else:
            cut = slice_tensor(tensor, piece.row, sizes=self._sizes, kept=kept)
        return cut.to(self._dtype or cut.dtype).contiguous()


def _pieces(
    checkpoint: Checkpoint, selection: Selection, config: Mapping[str, Any], prune: Prune
) -> Iterator[Piece]:
    """Every tensor of the new model in the order it is written."""
    family = checkpoint.family
    new_layers: list[tuple[int, int]] = list(enumerate(selection.layers))
    origin: dict[str, tuple[str, Tensor, int | None]] = {}
    for row in family.tensors:
        if row.per_layer:
            for new, old in new_layers:
                origin[row.name.format(i=new)] = (row.name.format(i=old), row, old)
        else:
            origin[row.name] = (row.name, row, None)
    for target, shape in expected_tensors(family, config).items():
        source, row, layer = origin[target]
        dtype = _SHORT[prune.dtype] if prune.dtype else checkpoint.entries[source].dtype
        yield Piece(target, dtype, shape, source, row, layer)


_SHORT = {name: short for short, name in DTYPE_NAMES.items()}  # "bfloat16" -> "BF16"


def _same_model(checkpoint: Checkpoint, scores: Scores) -> None:
    """Scores fit a model of the same family and sizes; an artifact must be the very one."""
    info = scores.info
    mine = sizes_of(checkpoint.family, checkpoint.config)
    manifest = (checkpoint.path / MANIFEST).is_file()
    if info.model_type != checkpoint.family.model_type or dict(info.sizes) != mine:
        cause = f"the scores are of a {info.model_type} with {_differing(info.sizes, mine)}"
    elif manifest and info.model_identity not in (None, identity(checkpoint.path)):
        cause = "the scores are of another model of the same shape"
    else:
        return
    raise ParetronError(
        Problem(
            Code.RUN_MISMATCH,
            cause,
            where=str(checkpoint.path),
            fix="run `paretron score` on this model",
        )
    )


def _differing(theirs: Sizes, mine: Sizes) -> str:
    different = [axis for axis in mine if theirs.get(axis) != mine[axis]]
    texts = [f"{axis} {theirs.get(axis)} (here {mine[axis]})" for axis in different]
    return ", ".join(texts) or "the same sizes"
