"""Teacher and student side by side, one layer of each at a time, over all calibration samples.

The student's layer reads what the student's layers before it made (sequentially, on the pruned
prefix); what it should have made is the teacher's own residual stream in the student's coordinates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paretron.compensate.basis import covariance_sum
from paretron.compensate.losses import HeadLoss
from paretron.compensate.model import StudentStack, module_of, run_layer
from paretron.compensate.moments import Moments
from paretron.compensate.residual import Half, bias_of, final_norm
from paretron.compensate.trimmed import Trimmed
from paretron.families import Tensor, logit_rule
from paretron.importance.executor import Batch, LayerStack, Prepared
from paretron.importance.states import HiddenStates
from paretron.importance.stream import StreamedStack

# Slots of hidden states: the teacher's before a layer, between its halves and after it (and after
# the layers behind it that are removed), the student's before a layer and between its halves.
BEFORE, BETWEEN, AFTER, MINE, MINE_BETWEEN = range(5)


@dataclass(frozen=True)
class Samples:
    """What a walk runs on: matrices are fitted to `fit`, figures are of `held`, which may be the
    same."""

    fit: tuple[Batch, ...]
    held: tuple[Batch, ...]

    @property
    def all(self) -> tuple[Batch, ...]:
        """Every batch once; those of `fit` first."""
        return self.fit if self.held is self.fit else (*self.fit, *self.held)

    @property
    def held_numbers(self) -> range:
        """Where the batches of `held` stand in `all`."""
        return range(len(self.all) - len(self.held), len(self.all))


@torch.no_grad()
def stream_covariance(
    teacher: StreamedStack, trimmed: Trimmed, batches: Sequence[Batch], states: HiddenStates
) -> torch.Tensor:
    """Second moments of what every norm of the teacher reads, token-normalised, fp64 [D, D].

    Sums of several sets of samples add up.
    """
    family, total = teacher.family, torch.zeros((), dtype=torch.float64, device=teacher.device)
    prepared = _prepared(teacher, trimmed, batches, states)
    for i in range(len(teacher)):
        half = trimmed.halves(i)[1]
        with teacher.loaded(i):
            norm = module_of(teacher, half.norm, i)
            for b, batch in enumerate(batches):
                before = states[BEFORE, b]
                after, (between,) = run_layer(teacher, i, prepared[b], before, inputs_of=(norm,))
                for stream in (before, between):
                    total = total + covariance_sum(tokens(stream, batch), norm=family.norm)
                states[BEFORE, b] = after
    for b, batch in enumerate(batches):
        total = total + covariance_sum(tokens(states[BEFORE, b], batch), norm=family.norm)
    return total


class Walk:
    """One pass over the layers that stay; `layers`, `final`, `head` give its tensors.

    `ridge` is the weight of the plain trimmed matrices against the fitted ones, or None for no
    refit. `losses` are the teacher's and the student's mean next-token loss on the held samples, in
    nats. `errors[j]` is the share of the teacher's stream, by energy, that the student's stream
    misses after its layer j, on the held samples.
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
    ) -> None:
        self.errors: list[float] = []
        self.losses = (math.nan, math.nan)  # the teacher's and the student's
        self._teacher = teacher
        self._student = student
        self._trimmed = trimmed
        self._samples = samples
        self._states = states
        self._ridge = ridge
        self._fitted = trimmed.rotated or ridge is not None
        family, config = trimmed.family, trimmed.checkpoint.config
        known = "residual_multiplier" in family.settings
        self._multiplier = float(config.get("residual_multiplier", 1.0)) if known else 1.0

    @torch.no_grad()
    def layers(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of every layer of the student in order, named as on disk, fp32."""
        batches, states = self._samples.all, self._states
        of_teacher = _prepared(self._teacher, self._trimmed, batches, states)
        for b in range(len(batches)):
            states[MINE, b] = self._trimmed.coordinates.of(states[BEFORE, b])
        of_student = [self._student.prepare_embedded(states[MINE, b]).without_hidden()
                      for b in range(len(batches))]  # fmt: skip
        kept = self._trimmed.selection.layers
        for gone in range(kept[0]):
            self._run_teacher(gone, of_teacher, BEFORE)
        for j, i in enumerate(kept):
            norms = self._run_teacher_layer(i, of_teacher)
            following = kept[j + 1] if j + 1 < len(kept) else len(self._teacher)
            for gone in range(i + 1, following):
                self._run_teacher(gone, of_teacher, AFTER)
            yield self._fit_layer(j, i, norms, of_student)
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
            scale = self._scale(put(1.0), BEFORE, MINE)
        norm, fitted = put(scale), None
        if self._ridge is not None and not tied:
            gamma = trimmed.gamma(row.name, None)
            fitted = self._map(teacher_norm, norm, gamma, None, BEFORE, MINE)
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

    def _run_teacher(self, number: int, prepared: Sequence[Prepared], slot: int) -> None:
        with self._teacher.loaded(number):
            for b in range(len(prepared)):
                stream = self._states[slot, b]
                self._states[slot, b] = run_layer(self._teacher, number, prepared[b], stream)[0]

    def _run_teacher_layer(
        self, number: int, prepared: Sequence[Prepared]
    ) -> tuple[nn.Module, nn.Module]:
        """Run the teacher's layer; its two norms, to be kept when its other weights go."""
        if not self._fitted:
            self._run_teacher_plainly(number, prepared)
            return nn.Identity(), nn.Identity()
        rows = self._trimmed.halves(number)
        with self._teacher.loaded(number):
            first, second = (module_of(self._teacher, h.norm, number) for h in rows)
            for b in range(len(prepared)):
                after, (between,) = run_layer(
                    self._teacher, number, prepared[b], self._states[BEFORE, b],
                    inputs_of=(second,),
                )  # fmt: skip
                self._states[BETWEEN, b], self._states[AFTER, b] = between, after
            return copy.deepcopy(first), copy.deepcopy(second)

    def _run_teacher_plainly(self, number: int, prepared: Sequence[Prepared]) -> None:
        for b in range(len(prepared)):
            self._states[AFTER, b] = self._states[BEFORE, b]
        self._run_teacher(number, prepared, AFTER)

    def _fit_layer(
        self, j: int, i: int, norms: tuple[nn.Module, nn.Module], prepared: Sequence[Prepared]
    ) -> dict[str, torch.Tensor]:
        """The student's layer j for the teacher's i; moves the student's states past it."""
        tensors = self._trimmed.layer(j)
        if self._fitted:
            halves_of = self._trimmed.halves(i)
            second = module_of(self._student, halves_of[1].norm, j)
            self._fit_norm(tensors, 0, j, i, norms[0], BEFORE, MINE)
            self._fit_writer(tensors, halves_of[0], j, i, prepared, BETWEEN, until=second)
            with self._student.holding(j, tensors):
                for b, one in enumerate(prepared):
                    mine = self._states[MINE, b]
                    end, _ = run_layer(self._student, j, one, mine, until=second)
                    self._states[MINE_BETWEEN, b] = end
            self._fit_norm(tensors, 1, j, i, norms[1], BETWEEN, MINE_BETWEEN)
            self._fit_writer(tensors, halves_of[1], j, i, prepared, AFTER, until=None)
        with self._student.holding(j, tensors):
            for b, one in enumerate(prepared):
                self._states[MINE, b] = run_layer(self._student, j, one, self._states[MINE, b])[0]
        return tensors

    def _fit_norm(
        self,
        tensors: dict[str, torch.Tensor],
        half: int,
        j: int,
        i: int,
        teacher_norm: nn.Module,
        theirs: int,
        mine: int,
    ) -> None:
        """Fit a norm's scale, where its weight was folded away, and what its readers see."""
        trimmed, rows = self._trimmed, self._trimmed.halves(i)[half]
        name = rows.norm.name.format(i=j)
        with self._student.holding(j, tensors):
            norm = copy.deepcopy(module_of(self._student, rows.norm, j))
        if trimmed.rotated:
            scale = self._scale(norm, theirs, mine)
            tensors[name] = trimmed.norm(rows.norm, i, scale=scale)
            norm.get_parameter("weight").copy_(tensors[name])
        if self._ridge is not None:
            gamma = trimmed.gamma(rows.norm.name, i)
            bias = bias_of(trimmed.family, rows.norm, trimmed.checkpoint.config, i)
            absorbed = bias if trimmed.rotated and rows.absorbs else None
            fitted = self._map(teacher_norm, norm, gamma, absorbed, theirs, mine)
            tensors |= trimmed.readers(j, half, fitted)

    def _scale(self, norm: nn.Module, theirs: int, mine: int) -> float:
        """The s that brings the student's normalised stream closest to the teacher's.

        Least squares of one number: sum of <z, B x> over the sum of |z|^2, both of mean square 1.
        """
        product = square = 0.0
        kind = self._trimmed.family.norm
        for b, batch in enumerate(self._samples.fit):
            x = normalised(tokens(self._states[theirs, b], batch), norm=kind)
            z = normalised(tokens(self._states[mine, b], batch), norm=kind)
            wanted = self._trimmed.coordinates.of(x).double()
            product += float((z.double() * wanted).sum())
            square += float(z.double().square().sum())
        return product / square

    def _map(
        self,
        teacher_norm: nn.Module,
        norm: nn.Module,
        gamma: torch.Tensor,
        absorbed: Tensor | None,
        theirs: int,
        mine: int,
    ) -> torch.Tensor:
        """M [D, K]: what the teacher's norm gives, of what the student's gives, by ridge."""
        plain = self._plain_map(gamma)
        moments = Moments.zeros(plain.shape[1], plain.shape[0], device=self._teacher.device)
        for b, batch in enumerate(self._samples.fit):
            given = teacher_norm(tokens(self._states[theirs, b], batch))
            if absorbed is not None:
                given = given - teacher_norm.get_parameter("bias")
            found = norm(tokens(self._states[mine, b], batch))
            moments.add(found, given - found @ plain.to(found).T)
        assert self._ridge is not None
        return plain + moments.solve(ridge=self._ridge).float().to(plain.device)

    def _plain_map(self, gamma: torch.Tensor) -> torch.Tensor:
        """The map that trimming alone amounts to."""
        identity = self._trimmed.coordinates.of(torch.eye(len(gamma)))
        return gamma[:, None] * identity if self._trimmed.rotated else identity

    def _fit_writer(
        self,
        tensors: dict[str, torch.Tensor],
        half: Half,
        j: int,
        i: int,
        prepared: Sequence[Prepared],
        theirs: int,
        *,
        until: nn.Module | None,
    ) -> None:
        """Add to a matrix what its input tells of the part of the stream that is missing."""
        row = half.writer
        if self._ridge is None or row is None:
            return
        name = row.name.format(i=j)
        writer = module_of(self._student, row, j)
        outputs, inputs = tensors[name].shape
        moments = Moments.zeros(inputs, outputs, device=self._teacher.device)
        with self._student.holding(j, tensors):
            for b, batch in enumerate(self._samples.fit):
                mine = self._states[MINE, b]
                stream, (read,) = run_layer(
                    self._student, j, prepared[b], mine, inputs_of=(writer,), until=until
                )
                wanted = self._trimmed.coordinates.of(self._states[theirs, b])
                missing = (wanted - stream) / self._multiplier
                moments.add(tokens(read, batch), tokens(missing, batch))
        tensors[name] = tensors[name] + moments.solve(ridge=self._ridge).float().cpu()

    def _missed(self) -> float:
        missed = energy = 0.0
        for b in self._samples.held_numbers:
            batch = self._samples.all[b]
            wanted = tokens(self._trimmed.coordinates.of(self._states[BEFORE, b]), batch).double()
            found = tokens(self._states[MINE, b], batch).double()
            missed += float((wanted - found).square().sum())
            energy += float(tokens(self._states[BEFORE, b], batch).double().square().sum())
        return missed / energy


def tokens(x_BTD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The positions that count, [N, D]."""
    parts = zip(x_BTD, batch.lengths, strict=True)
    return torch.cat([sample[:length] for sample, length in parts])


def normalised(x_ND: torch.Tensor, *, norm: str) -> torch.Tensor:
    """The stream as a norm leaves it before weight and bias; nothing is added to the variance."""
    x = x_ND - x_ND.mean(-1, keepdim=True) if norm == "layernorm" else x_ND
    square = x.square().mean(-1, keepdim=True)
    return x * square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()


@torch.no_grad()
def _prepared(
    teacher: LayerStack, trimmed: Trimmed, batches: Sequence[Batch], states: HiddenStates
) -> list[Prepared]:
    """What every layer is called with; the embedded tokens wait in their slot."""
    of_shape: dict[tuple[int, ...], Prepared] = {}
    out = []
    for b, batch in enumerate(batches):
        found = teacher.prepare_embedded(trimmed.embedded(batch.ids_BT))
        states[BEFORE, b] = found.hidden_BTD
        out.append(of_shape.setdefault(tuple(batch.ids_BT.shape), found.without_hidden()))
    return out
