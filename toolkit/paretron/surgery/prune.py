"""The prune stage: tensors pass by in blocks of rows, are cut and written.

No model is ever built. One thread reads and cuts ahead, one writes, one hashes what is written;
what is held at a time is a few blocks, whatever the checkpoint's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.manifest import MANIFEST, Provenance, identity
from paretron.artifacts.passing import BLOCK_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import refuse_overlap, staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.artifacts.writer import Layout, TensorWriter
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Placed, Sizes, placed_tensors
from paretron.families import sizes as sizes_of
from paretron.families.kinds import merging_problem
from paretron.families.table import with_sizes
from paretron.importance.scores import Scores
from paretron.recipe import Prune, Score
from paretron.surgery.ahead import read_ahead
from paretron.surgery.cut import Cutter, Piece
from paretron.surgery.selection import Selection, choose

OnEvent = Callable[[str, Mapping[str, object]], None]


def prune(
    model: Path,
    scores: Path,
    *,
    sizes: Sizes,
    prune: Prune,
    score: Score,
    out: Path,
    provenance: Provenance | Callable[[], Provenance],
    selection: Selection | None = None,
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Cut a checkpoint to the target `sizes` by its scores; `out` is a Hugging Face repository.

    A `selection` that was made in rounds is kept instead of the best by the scores. `provenance`
    may be a function, asked when everything is written. Errors: RECIPE_TARGET, RUN_MISMATCH when
    the scores are another model's, and those of reading and writing.
    """
    refuse_overlap(out, model)
    checkpoint = Checkpoint.open(model)
    check_tokenizer(model, vocab=checkpoint.config["vocab_size"])
    loaded = Scores.load(scores)
    same_model(checkpoint, loaded)
    selection = selection or choose(loaded, sizes=sizes, score=score)
    cut = Cut.plan(checkpoint, selection, sizes=sizes, prune=prune)
    digests: dict[str, str] = {}
    with (
        staged(
            out,
            provenance=provenance,
            overwrite=overwrite,
            needed_bytes=cut.nbytes,
            digests=digests,
        ) as folder,
        _no_memory_told(model),
    ):
        cut.write(folder, digests=digests, on_event=on_event)


def write_pruned(
    checkpoint: Checkpoint,
    selection: Selection,
    folder: Path,
    *,
    sizes: Sizes,
    prune: Prune,
) -> None:
    """Write what a selection keeps of a checkpoint, config and tokenizer included."""
    Cut.plan(checkpoint, selection, sizes=sizes, prune=prune).write(folder)


@dataclass(frozen=True)
class Cut:
    """What will be written: every tensor in order, and the config, refused before any work."""

    checkpoint: Checkpoint
    pieces: tuple[Piece, ...]
    cutter: Cutter
    config: Mapping[str, Any]
    max_shard_bytes: int

    @classmethod
    def plan(
        cls,
        checkpoint: Checkpoint,
        selection: Selection,
        *,
        sizes: Sizes,
        prune: Prune,
        block_bytes: int = BLOCK_BYTES,
    ) -> Cut:
        """Settle names, shapes, dtypes and the config without reading a weight.

        UNSUPPORTED where layers are to be merged that are of several kinds.
        """
        whole = len(selection.layers) == sizes_of(checkpoint.family, checkpoint.config)["layers"]
        if not whole and prune.layers == "merge":
            refuse_mixed_layers(checkpoint)
        config = with_sizes(
            checkpoint.family,
            checkpoint.config,
            sizes,
            kept_layers=None if whole else selection.layers,
        )
        return cls(
            checkpoint,
            tuple(_pieces(checkpoint, selection, config, prune)),
            Cutter(checkpoint, selection, prune, block_bytes=block_bytes),
            servable_config(config, dtype=prune.dtype or DTYPE_NAMES[checkpoint.dtype]),
            int(prune.max_shard_gb * 1e9),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(prod(p.shape) * DTYPE_BYTES[p.dtype] for p in self.pieces)

    def write(
        self,
        folder: Path,
        *,
        digests: dict[str, str] | None = None,
        on_event: OnEvent = lambda kind, fields: None,
    ) -> None:
        """Write everything but the manifest; `digests` gets the sha256 of every shard."""
        layout: Layout = {p.target: (p.dtype, p.shape) for p in self.pieces}
        done, current = 0, None
        with TensorWriter(
            folder, layout, max_shard_bytes=self.max_shard_bytes, digests=digests
        ) as writer:
            for piece, rows in read_ahead(self.cutter.blocks(self.pieces)):
                writer.write(piece.target, rows)
                if piece is not current:
                    current, done = piece, done + 1
                    fields = {"done": done, "total": len(self.pieces), "unit": "tensors"}
                    on_event("progress", fields)
        write_companions(folder, config=self.config, source=self.checkpoint.path)


def _pieces(
    checkpoint: Checkpoint, selection: Selection, config: Mapping[str, Any], prune: Prune
) -> Iterator[Piece]:
    """Every tensor of the new model in the order it is written."""
    size = sizes_of(checkpoint.family, config)
    for new in placed_tensors(checkpoint.family, config):
        layer = None if new.layer is None else selection.layers[new.layer]
        old = Placed(new.row, layer, selection.source_expert(layer, new.expert))
        dtype = _SHORT[prune.dtype] if prune.dtype else checkpoint.entries[old.name].dtype
        yield Piece(new.name, dtype, new.row.shape(size), old.name, new.row, layer, new.expert)


@contextmanager
def _no_memory_told(model: Path) -> Iterator[None]:
    """MEMORY instead of what Python, torch and a thread that cannot start say."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(t in str(error) for t in _NO_MEMORY):
            raise
        raise ParetronError(
            Problem(
                Code.MEMORY,
                "not enough memory for a few blocks of a tensor",
                where=str(model),
                fix="free some memory, or raise this process's limit by a gigabyte",
            )
        ) from error


_NO_MEMORY = ("can't allocate memory", "can't start new thread")
_SHORT = {name: short for short, name in DTYPE_NAMES.items()}  # "bfloat16" -> "BF16"


def refuse_mixed_layers(checkpoint: Checkpoint) -> None:
    """UNSUPPORTED where layers are to be merged that are of several kinds."""
    if problem := merging_problem(checkpoint.family, checkpoint.config):
        raise ParetronError(problem)


def same_model(checkpoint: Checkpoint, scores: Scores) -> None:
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
