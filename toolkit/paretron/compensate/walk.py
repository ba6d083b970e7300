"""Teacher and student side by side, one layer of each at a time, over all calibration samples.

The student's layer reads what the student's layers before it made (sequentially, on the pruned
prefix); what it should have made is the teacher's own residual stream in the student's coordinates.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from paretron.compensate.experts import ExpertTokens
from paretron.compensate.fit import norm_scale, reader_map
from paretron.compensate.losses import HeadLoss
from paretron.compensate.means import Means
from paretron.compensate.model import (
    Piece,
    StudentStack,
    experts_of,
    module_of,
    pass_half,
    run_half,
)
from paretron.compensate.moments import Moments
from paretron.compensate.residual import Half, final_norm
from paretron.compensate.samples import BEFORE, Samples, counting, prepare_all, tokens
from paretron.compensate.trimmed import Trimmed
from paretron.families import Tensor, logit_rule
from paretron.importance.executor import LayerStack, Prepared
from paretron.importance.experts import Experts
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack

# Slots of hidden states: the teacher's before a layer, between its halves and after it (and after
# the layers behind it that are removed), the student's before a layer and between its halves.
BETWEEN, AFTER, MINE, MINE_BETWEEN = range(BEFORE + 1, BEFORE + 5)


@dataclass(frozen=True)
class _Place:
    """Slots of half a layer: what its norm reads in both models, what it should give and gives."""

    theirs: int
    mine: int
    wanted: int
    result: int


_PLACES = (
    _Place(BEFORE, MINE, BETWEEN, MINE_BETWEEN),
    _Place(BETWEEN, MINE_BETWEEN, AFTER, MINE),
)


class Walk:
    """One pass over the layers that stay; `layers`, `final`, `head` give its tensors.

    `ridge` is the weight of the plain trimmed matrices against the fitted ones, or None for no
    refit but, with `means`, that of the means of what is written. `losses` are the teacher's and
    the student's mean next-token loss on the held samples, in nats. `errors[j]` is the share of the
    teacher's stream, by energy, that the student's stream misses after its layer j, on the held
    samples. In `scratch` lies what the tokens of one layer's experts need.
    """

    def __init__(
        self,
        teacher: StreamedStack,
        student: StudentStack,
        trimmed: Trimmed,
        samples: Samples,
        states: HiddenStates,
        *,
        ridge: float | None,
        means: bool = False,
        scratch: Path | None = None,
    ) -> None:
        self.errors: list[float] = []
        self.losses = (math.nan, math.nan)  # the teacher's and the student's
        self._teacher = teacher
        self._student = student
        self._trimmed = trimmed
        self._samples = samples
        self._states = states
        self._ridge = ridge
        self._means = means
        self._scratch = scratch
        family, config = trimmed.family, trimmed.checkpoint.config
        known = "residual_multiplier" in family.settings
        self._multiplier = float(config.get("residual_multiplier", 1.0)) if known else 1.0

    @torch.no_grad()
    def layers(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of every half of a layer of the student in order, named as on disk, fp32."""
        batches, states = self._samples.all, self._states
        of_teacher = prepare_all(self._teacher, self._trimmed, batches, states)
        for b in range(len(batches)):
            states[MINE, b] = self._trimmed.coordinates.of(states[BEFORE, b])
        of_student = [self._student.prepare_embedded(states[MINE, b]).without_hidden()
                      for b in range(len(batches))]  # fmt: skip
        kept = self._trimmed.selection.layers
        for gone in range(kept[0]):
            self._run_teacher(gone, of_teacher, BEFORE, BEFORE)
        for j, i in enumerate(kept):
            norms = self._run_teacher(i, of_teacher, BEFORE, AFTER, between=BETWEEN)
            following = kept[j + 1] if j + 1 < len(kept) else len(self._teacher)
            for gone in range(i + 1, following):
                self._run_teacher(gone, of_teacher, AFTER, AFTER)
            for half in (0, 1):
                yield self._fit_half(half, j, i, norms[half], of_student)
            for b in range(len(batches)):
                states[BEFORE, b] = states[AFTER, b]
            self.errors.append(self._missed())

    @torch.no_grad()
    def final(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The map through which the head reads, and the last norm's tensors; after all layers."""
        trimmed, row = self._trimmed, final_norm(self._trimmed.family)
        tied = bool(trimmed.config.get("tie_word_embeddings", False))
        bias = next((t for t in trimmed.family.tensors
                     if t.name == row.name.removesuffix("weight") + "bias"), None)  # fmt: skip

        def put(scale: float) -> nn.Module:
            own = {"weight": trimmed.norm(row, None, scale=scale)}
            if bias is not None:
                own["bias"] = trimmed.norm_bias(bias, None, absorbed=False)
            self._student.put_final_norm(own)
            return self._student.model.get_submodule(row.name.removesuffix(".weight"))

        teacher_norm = self._teacher.model.get_submodule(row.name.removesuffix(".weight"))
        scale = 1.0
        if trimmed.rotated:
            scale = self._scale(BEFORE, MINE)
        norm, fitted = put(scale), None
        if self._ridge is not None and not tied:
            fitted = self._map(teacher_norm, norm, row, None, BEFORE, MINE, without=None)
        named = {row.name: norm.get_parameter("weight").cpu()}
        if bias is not None:
            named[bias.name] = norm.get_parameter("bias").cpu()
        return fitted, named

    @torch.no_grad()
    def head(self, map_DK: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """The student's head in blocks of rows, fp32; `losses` holds once all have passed."""
        teacher, student = (
            self._head_loss(self._teacher, BEFORE),
            self._head_loss(self._student, MINE),
        )
        for theirs, mine in self._trimmed.head(map_DK):
            teacher.add(theirs)
            student.add(mine)
            yield mine
        self.losses = (teacher.mean, student.mean)

    def _head_loss(self, stack: LayerStack, slot: int) -> HeadLoss:
        """Of one of the two models on the held samples, before any row of its head."""
        states, targets = [], []
        for b in self._samples.held_numbers:
            follows = self._samples.all[b].targets()
            normed = stack.final_norm(self._states[slot, b])[:, :-1]
            states.append(normed[follows >= 0])
            targets.append(follows[follows >= 0])
        trimmed = self._trimmed
        rule = logit_rule(trimmed.family, trimmed.checkpoint.config)
        return HeadLoss(torch.cat(states), torch.cat(targets).to(stack.device), rule)

    def _run_teacher(
        self,
        number: int,
        prepared: Sequence[Prepared],
        source: int,
        target: int,
        *,
        between: int | None = None,
    ) -> tuple[nn.Module, nn.Module]:
        """Run a layer of the teacher; its two norms, to be kept when its other weights go."""
        rows = self._trimmed.halves(number)
        with self._teacher.loaded(number):
            for b, one in enumerate(prepared):
                stream = self._states[source, b]
                middle = pass_half(self._teacher, number, 0, rows, one, stream)
                if between is not None:
                    self._states[between, b] = middle
                self._states[target, b] = pass_half(self._teacher, number, 1, rows, one, middle)
            first, second = (module_of(self._teacher, half.norm, number) for half in rows)
            return copy.deepcopy(first), copy.deepcopy(second)

    def _fit_half(
        self, half: int, j: int, i: int, teacher_norm: nn.Module, prepared: Sequence[Prepared]
    ) -> dict[str, torch.Tensor]:
        """Half of the student's layer j for the teacher's i; moves the student's states past it."""
        place, rows = _PLACES[half], self._trimmed.halves(i)
        tensors = self._trimmed.half(j, half)
        if self._trimmed.rotated or self._ridge is not None:
            self._fit_norm(tensors, half, j, i, teacher_norm, place)
        if self._ridge is not None and rows[half].routed:
            self._fit_experts(tensors, j, rows, prepared, place)
        elif self._ridge is not None or (self._means and not rows[half].routed):
            self._fit_writer(tensors, half, j, rows, prepared, place)
        with self._student.holding(j, tensors):
            for b, one in enumerate(prepared):
                mine = self._states[place.mine, b]
                self._states[place.result, b] = pass_half(self._student, j, half, rows, one, mine)
        return tensors

    def _fit_norm(
        self,
        tensors: dict[str, torch.Tensor],
        half: int,
        j: int,
        i: int,
        teacher_norm: nn.Module,
        place: _Place,
    ) -> None:
        """Fit a norm's scale, where its weight was folded away, and what its readers see."""
        trimmed, rows = self._trimmed, self._trimmed.halves(i)[half]
        if trimmed.rotated:
            scale = self._scale(place.theirs, place.mine)
            tensors[rows.norm.name.format(i=j)] = trimmed.norm(rows.norm, i, scale=scale)
        if self._ridge is None:
            return
        with self._student.holding(j, tensors):
            norm = copy.deepcopy(module_of(self._student, rows.norm, j))
        absorbed = trimmed.rotated and rows.absorbs
        bias = teacher_norm.get_parameter("bias") if absorbed else None
        fitted = self._map(teacher_norm, norm, rows.norm, i, place.theirs, place.mine, without=bias)
        for name, reader in trimmed.readers(j, half, fitted):
            tensors[name] = reader

    def _scale(self, theirs: int, mine: int) -> float:
        pairs = self._pairs(theirs, mine)
        return norm_scale(pairs, self._trimmed.coordinates, norm=self._trimmed.family.norm)

    def _map(
        self,
        teacher_norm: nn.Module,
        norm: nn.Module,
        row: Tensor,
        layer: int | None,
        theirs: int,
        mine: int,
        *,
        without: torch.Tensor | None,
    ) -> torch.Tensor:
        assert self._ridge is not None
        plain = self._trimmed.reader_map(row, layer)
        return reader_map(
            self._pairs(theirs, mine), teacher_norm, norm, plain, without=without, ridge=self._ridge
        )

    def _pairs(self, theirs: int, mine: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The positions that count of two slots, a few at a time, over the samples of the fit."""
        for b, batch in enumerate(self._samples.fit):
            both = (tokens(self._states[slot, b], batch) for slot in (theirs, mine))
            yield from zip(*both, strict=True)

    def _fit_writer(
        self,
        tensors: dict[str, torch.Tensor],
        half: int,
        j: int,
        rows: tuple[Half, Half],
        prepared: Sequence[Prepared],
        place: _Place,
    ) -> None:
        """Add to a matrix what its input tells of the part of the stream that is missing."""
        (row,) = rows[half].writers
        name = row.name.format(i=j)
        outputs, inputs = tensors[name].shape
        sums: Moments | Means = (Means if self._ridge is None else Moments).zeros(
            inputs, outputs, device=self._teacher.device
        )
        for piece, missing, counts in self._missing(
            tensors, half, j, rows, prepared, place, module_of(self._student, row, j)
        ):
            sums.add(piece.inputs[0][counts], missing[counts])
        if isinstance(sums, Means):
            added = sums.solve()
        else:
            assert self._ridge is not None
            added = sums.solve(ridge=self._ridge)
        del sums  # half of what is held, before what follows is copied
        tensors[name] = tensors[name] + added.float().cpu()

    def _fit_experts(
        self,
        tensors: dict[str, torch.Tensor],
        j: int,
        rows: tuple[Half, Half],
        prepared: Sequence[Prepared],
        place: _Place,
    ) -> None:
        """The same for experts that share the work: each is fitted on the tokens routed to it."""
        assert self._ridge is not None
        (row,) = rows[1].writers
        experts = experts_of(self._student, j)
        calls: list[tuple[torch.Tensor, ...]] = []  # what they read, which of them, the weights
        count = sum(sum(batch.lengths) for batch in self._samples.fit)
        with tempfile.TemporaryDirectory(prefix="experts-", dir=self._scratch) as folder:
            seen = ExpertTokens(Path(folder), count, self._trimmed.size["hidden"])
            handle = experts.register_forward_pre_hook(lambda _, given: calls.append(given))
            try:
                for _, missing, counts in self._missing(tensors, 1, j, rows, prepared, place):
                    read, choices, weights = calls.pop()
                    seen.add(read[counts], choices[counts], weights[counts], missing[counts])
            finally:
                handle.remove()
            with self._student.holding(j, tensors):
                for e, added in seen.fits(cast(Experts, experts), ridge=self._ridge):
                    name = row.name.format(i=j, e=e)
                    tensors[name] = tensors[name] + added.cpu()

    def _missing(
        self,
        tensors: dict[str, torch.Tensor],
        half: int,
        j: int,
        rows: tuple[Half, Half],
        prepared: Sequence[Prepared],
        place: _Place,
        *readers: nn.Module,
    ) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
        """Half a layer over the samples of the fit: each piece with what `readers` have read,
        what should be added to it [n, K], and which of its positions count."""
        with self._student.holding(j, tensors):
            for b, batch in enumerate(self._samples.fit):
                wanted = self._states[place.wanted, b].flatten(0, 1)
                counts = counting(batch).to(wanted.device)
                for piece in run_half(
                    self._student, j, half, rows, prepared[b], self._states[place.mine, b],
                    inputs_of=readers,
                ):  # fmt: skip
                    stream = self._trimmed.coordinates.of(wanted[piece.where])
                    missing = (stream - piece.out) / self._multiplier
                    yield piece, missing, counts[piece.where]

    def _missed(self) -> float:
        missed = energy = 0.0
        for b in self._samples.held_numbers:
            batch = self._samples.all[b]
            both = (tokens(self._states[slot, b], batch) for slot in (BEFORE, MINE))
            for theirs, mine in zip(*both, strict=True):
                wanted = self._trimmed.coordinates.of(theirs).double()
                missed += float((wanted - mine.double()).square().sum())
                energy += float(theirs.double().square().sum())
        return missed / energy
