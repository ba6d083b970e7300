"""The prune stage with compensation: checkpoint, scores and calibration tokens in, student out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import refuse_overlap, staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.artifacts.writer import Layout, TensorWriter
from paretron.compensate.basis import principal_basis
from paretron.compensate.decide import Decision, decide
from paretron.compensate.model import StudentStack
from paretron.compensate.residual import role_of
from paretron.compensate.trimmed import Trimmed
from paretron.compensate.walk import Samples, Walk, stream_covariance
from paretron.data.store import TokenStore, sample_windows
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.families import Placed, Sizes, placed_tensors
from paretron.families import sizes as sizes_of
from paretron.families.table import with_sizes
from paretron.importance.collect import batches_of
from paretron.importance.scores import Scores
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack
from paretron.recipe import Calibration, Compensate, Prune, Score
from paretron.surgery.prune import prune as trim
from paretron.surgery.prune import same_model
from paretron.surgery.selection import Selection, choose

OnEvent = Callable[[str, Mapping[str, object]], None]

FIGURES = "compensation.json"
STATES_BYTES = 1 << 29  # hidden states that stay in memory; more go to files


def prune_compensated(
    model: Path,
    scores: Path,
    calibration: Path,
    *,
    sizes: Sizes,
    prune: Prune,
    score: Score,
    compensate: Compensate,
    calibration_settings: Calibration,
    seed: int,
    out: Path,
    provenance: Provenance | Callable[[], Provenance],
    overwrite: bool = False,
    on_event: OnEvent,
) -> None:
    """Cut a checkpoint to the target `sizes`, rotated and refitted as `compensate` says.

    `calibration` is a token store. `out` is a Hugging Face repository with compensation.json: the
    loss on windows that nothing was fitted to, of the teacher, of plain trimming, of this student.
    Errors: RECIPE_TARGET, RECIPE_VALUE, RUN_MISMATCH, INPUT_CORPUS, and those of reading and
    writing.
    """
    refuse_overlap(out, model)
    checkpoint = Checkpoint.open(model)
    check_tokenizer(model, vocab=checkpoint.config["vocab_size"])
    loaded = Scores.load(scores)
    same_model(checkpoint, loaded)
    decision = decide(
        checkpoint.family,
        checkpoint.config,
        sizes=sizes_of(checkpoint.family, checkpoint.config),
        new=sizes,
        settings=compensate,
    )
    raise_all(decision.problems)
    if not decision.any:
        trim(
            model, scores, sizes=sizes, prune=prune, score=score, out=out, provenance=provenance,
            overwrite=overwrite, on_event=on_event,
        )  # fmt: skip
        return
    student = Student.of(
        checkpoint, choose(loaded, sizes=sizes, score=score), sizes=sizes, prune=prune,
        decision=decision, ridge=compensate.ridge, seed=seed,
    )  # fmt: skip
    windows = sample_windows(
        TokenStore.open(calibration),
        min(compensate.samples, calibration_settings.samples),
        calibration_settings.seq_len,
        seed,
    )
    samples = split_samples(list(windows), micro_batch=score.micro_batch)
    digests: dict[str, str] = {}
    with staged(
        out, provenance=provenance, overwrite=overwrite, needed_bytes=student.nbytes,
        digests=digests,
    ) as folder:  # fmt: skip
        figures = student.write(folder, samples, digests=digests, on_event=on_event)
        dump(folder / FIGURES, figures | {"notes": list(decision.notes)})
        on_event("compensated", figures["loss"])


def split_samples(windows: Sequence[torch.Tensor], *, micro_batch: int) -> Samples:
    """One window in eight is held back, the last ones; a single window serves for both."""
    held = max(1, len(windows) // 8)
    measured = tuple(batches_of(windows[-held:], micro_batch))
    if len(windows) == 1:
        return Samples(measured, measured)
    return Samples(tuple(batches_of(windows[:-held], micro_batch)), measured)


@dataclass(frozen=True)
class Student:
    """A student before it is made: what stays, its config, what is done to it, what it is cast to.

    `config` has its teacher's keys, `servable` is what is written.
    """

    checkpoint: Checkpoint
    selection: Selection
    config: Mapping[str, Any]
    servable: Mapping[str, Any]
    prune: Prune
    decision: Decision
    ridge: float
    seed: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        selection: Selection,
        *,
        sizes: Sizes,
        prune: Prune,
        decision: Decision,
        ridge: float,
        seed: int,
    ) -> Student:
        """Settle the config without reading a weight; refuses what no engine would serve."""
        whole = len(selection.layers) == sizes_of(checkpoint.family, checkpoint.config)["layers"]
        config = with_sizes(
            checkpoint.family,
            checkpoint.config,
            sizes,
            kept_layers=None if whole else selection.layers,
        )
        if decision.untie:
            config["tie_word_embeddings"] = False
        servable = servable_config(config, dtype=prune.dtype or DTYPE_NAMES[checkpoint.dtype])
        return cls(checkpoint, selection, config, servable, prune, decision, ridge, seed)

    @property
    def layout(self) -> Layout:
        """Name, dtype and shape of every tensor in the order it is written."""
        family = self.checkpoint.family
        size = sizes_of(family, self.config)
        return {
            place.name: (self._dtype(place), place.row.shape(size))
            for place in placed_tensors(family, self.config)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in self.layout.values())

    def write(
        self,
        folder: Path,
        samples: Samples,
        *,
        digests: dict[str, str] | None = None,
        on_event: OnEvent = lambda kind, fields: None,
    ) -> dict[str, Any]:
        """Write everything but the manifest; returns the figures of compensation.json."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = StreamedStack(self.checkpoint, dtype=torch.float32, device=device)
        with HiddenStates(memory_bytes=STATES_BYTES, folder=folder.parent) as states:
            trimmed = self._trimmed(None)
            kept_energy = None
            if self.decision.rotate:
                on_event("note", {"message": "measuring the residual stream"})
                covariance = stream_covariance(teacher, trimmed, samples.fit, states).cpu()
                basis, kept_energy = principal_basis(
                    covariance,
                    trimmed.size["hidden"],
                    norm=self.checkpoint.family.norm,
                    spread_seed=self.seed if self.decision.spread else None,
                )
                trimmed = self._trimmed(basis.float())
            walk = self._walk(teacher, trimmed, samples, states)
            self._write_tensors(walk, trimmed, folder, digests, on_event)
            write_companions(folder, config=self.servable, source=self.checkpoint.path)
            on_event("note", {"message": "measuring the student without compensation"})
            plain = self._plain_loss(teacher, samples, states)
        return {
            "rotated": self.decision.rotate,
            "refitted": self.decision.refit,
            "kept_energy": kept_energy,
            "windows": {
                name: sum(len(b.lengths) for b in batches)
                for name, batches in (("fit", samples.fit), ("held", samples.held))
            },
            "loss": {"teacher": walk.losses[0], "plain": plain, "compensated": walk.losses[1]},
            "missed_energy": walk.errors,
        }

    def _trimmed(self, basis: torch.Tensor | None) -> Trimmed:
        # Merged heads were no help to heads that are refitted, and harm without (measured).
        merge = self.prune.merge_heads is True or (
            self.prune.merge_heads == "auto" and not self.decision.refit
        )
        return Trimmed(self.checkpoint, self.selection, self.config, basis=basis, merge_heads=merge)

    def _walk(
        self, teacher: StreamedStack, trimmed: Trimmed, samples: Samples, states: HiddenStates
    ) -> Walk:
        stack = StudentStack(self.servable, device=teacher.device)
        ridge = self.ridge if self.decision.refit else None
        return Walk(teacher, stack, trimmed, samples, states, ridge=ridge)

    def _write_tensors(
        self,
        walk: Walk,
        trimmed: Trimmed,
        folder: Path,
        digests: dict[str, str] | None,
        on_event: OnEvent,
    ) -> None:
        layout, family = self.layout, self.checkpoint.family
        total = len(self.selection.layers)
        with TensorWriter(
            folder, layout, max_shard_bytes=int(self.prune.max_shard_gb * 1e9), digests=digests
        ) as writer:

            def put(name: str, rows: torch.Tensor) -> None:
                writer.write(name, _cast(rows, layout[name][0], name))

            outside = [p for p in placed_tensors(family, self.config) if p.layer is None]
            (embedding,) = [p.name for p in outside if role_of(family, p.row) == "embedding"]
            for rows in trimmed.embedding():
                put(embedding, rows)
            for done, tensors in enumerate(walk.layers(), start=1):
                for name, tensor in tensors.items():
                    put(name, tensor)
                on_event("progress", {"done": done, "total": total, "unit": "layers"})
            fitted, norms = walk.final()
            heads = [p.name for p in outside if role_of(family, p.row) == "head"]
            for place in outside:
                if place.name in norms:
                    put(place.name, norms[place.name])
                elif place.name in heads:
                    for rows in walk.head(fitted):
                        put(place.name, rows)
            if not heads:  # a tied head is only measured
                _run_out(walk.head(fitted))

    def _plain_loss(self, teacher: StreamedStack, samples: Samples, states: HiddenStates) -> float:
        """The held samples' loss of the student that is trimmed and nothing more."""
        trimmed = Trimmed(
            self.checkpoint,
            self.selection,
            dict(self.config) | _tied_as(self.checkpoint),
            basis=None,
            merge_heads=bool(self.prune.merge_heads),
        )
        stack = StudentStack(dict(self.servable) | _tied_as(self.checkpoint), device=teacher.device)
        held = Samples(samples.held, samples.held)
        walk = Walk(teacher, stack, trimmed, held, states, ridge=None)
        _run_out(walk.layers())
        fitted, _ = walk.final()
        _run_out(walk.head(fitted))
        return walk.losses[1]

    def _dtype(self, place: Placed) -> str:
        if self.prune.dtype is not None:
            return _SHORT[self.prune.dtype]
        old = place
        if place.layer is not None:
            layer = self.selection.layers[place.layer]
            old = Placed(place.row, layer, self.selection.source_expert(layer, place.expert))
        found = self.checkpoint.entries.get(old.name)  # an untied head has no source of its name
        return found.dtype if found else self.checkpoint.dtype


_SHORT = {name: short for short, name in DTYPE_NAMES.items()}  # "bfloat16" -> "BF16"


def _tied_as(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"tie_word_embeddings": bool(checkpoint.config.get("tie_word_embeddings", False))}


def _run_out(items: Iterator[object]) -> None:
    for _ in items:
        pass


def _cast(rows: torch.Tensor, dtype: str, name: str) -> torch.Tensor:
    """The rows in the dtype that is written; GATE_NONFINITE when it cannot hold them."""
    cast = rows.to(getattr(torch, DTYPE_NAMES[dtype])).contiguous()
    if not torch.isfinite(cast).all():
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"values are too large for {DTYPE_NAMES[dtype]}",
                where=name,
                fix="set prune.dtype to bfloat16 or float32",
            )
        )
    return cast
