"""One student: settled from configs, without reading a weight, then fitted and written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.companions import write_companions
from paretron.artifacts.config import DTYPE_NAMES, servable_config
from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.writer import Layout, TensorWriter
from paretron.compensate.basis import principal_basis
from paretron.compensate.decide import Decision
from paretron.compensate.model import StudentStack
from paretron.compensate.residual import role_of
from paretron.compensate.samples import Samples, stream_covariance
from paretron.compensate.trimmed import Trimmed
from paretron.compensate.walk import Walk
from paretron.errors import Code, ParetronError, Problem
from paretron.families import Placed, Sizes, placed_tensors
from paretron.families import sizes as sizes_of
from paretron.families.table import with_sizes
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack
from paretron.recipe import Prune
from paretron.surgery.prune import refuse_mixed_layers
from paretron.surgery.selection import Selection

OnEvent = Callable[[str, Mapping[str, object]], None]

_STATES_BYTES = 1 << 27  # hidden states that stay in memory; more go to files


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
        if not whole and prune.layers == "merge":
            refuse_mixed_layers(checkpoint)
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
        with HiddenStates(memory_bytes=_STATES_BYTES, folder=folder.parent) as states:
            teacher = self._teacher()
            if self.decision.rotate:
                on_event("note", {"message": "measuring the residual stream"})
            trimmed, kept_energy = self._turned(teacher, samples, states)
            walk = self._walk(teacher, trimmed, samples, states, folder.parent)
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

    def losses(self, samples: Samples, *, scratch: Path) -> dict[str, float]:
        """The held samples' loss, plainly trimmed and compensated; nothing is written."""
        with HiddenStates(memory_bytes=_STATES_BYTES, folder=scratch) as states:
            teacher = self._teacher()
            trimmed, _ = self._turned(teacher, samples, states)
            compensated = _loss(self._walk(teacher, trimmed, samples, states, scratch))
            return {
                "plain": self._plain_loss(teacher, samples, states),
                "compensated": compensated,
            }

    def _teacher(self) -> StreamedStack:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return StreamedStack(self.checkpoint, dtype=torch.float32, device=device)

    def _turned(
        self, teacher: StreamedStack, samples: Samples, states: HiddenStates
    ) -> tuple[Trimmed, float | None]:
        """The student before it is fitted, and the share of energy that its rotation keeps."""
        trimmed = self._trimmed(None)
        if not self.decision.rotate:
            return trimmed, None
        basis, kept_energy = principal_basis(
            stream_covariance(teacher, trimmed, samples.fit, states).cpu(),
            trimmed.size["hidden"],
            norm=self.checkpoint.family.norm,
            spread_seed=self.seed if self.decision.spread else None,
        )
        return self._trimmed(basis.float()), kept_energy

    def _trimmed(self, basis: torch.Tensor | None) -> Trimmed:
        merge = self.decision.merges_heads(self.prune.merge_heads)
        return Trimmed(
            self.checkpoint,
            self.selection,
            self.config,
            basis=basis,
            merge_heads=merge,
            merge_layers=self.prune.layers == "merge",
        )

    def _walk(
        self,
        teacher: StreamedStack,
        trimmed: Trimmed,
        samples: Samples,
        states: HiddenStates,
        scratch: Path,
    ) -> Walk:
        stack = StudentStack(self.servable, device=teacher.device)
        means = self.decision.means
        ridge = self.ridge if self.decision.refit and not means else None
        return Walk(
            teacher, stack, trimmed, samples, states, ridge=ridge, means=means, scratch=scratch
        )

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
            waiting: dict[str, torch.Tensor] = {}  # fitted, but others come before them
            inside = deque(
                p.name for p in placed_tensors(family, self.config) if p.layer is not None
            )
            for halves, tensors in enumerate(walk.layers(), start=1):
                waiting |= tensors
                while inside and inside[0] in waiting:
                    name = inside.popleft()
                    put(name, waiting.pop(name))
                del tensors  # not two halves at a time
                on_event("progress", {"done": halves // 2, "total": total, "unit": "layers"})
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
            merge_layers=self.prune.layers == "merge",
        )
        stack = StudentStack(dict(self.servable) | _tied_as(self.checkpoint), device=teacher.device)
        held = Samples(samples.held, samples.held)
        return _loss(Walk(teacher, stack, trimmed, held, states, ridge=None))

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


def _loss(walk: Walk) -> float:
    """The student's loss, once it has run to its end."""
    _run_out(walk.layers())
    fitted, _ = walk.final()
    _run_out(walk.head(fitted))
    return walk.losses[1]


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
