"""Losses of a chunk of logits as one kernel on CUDA, a row at a time; Triton lives here alone.

A row is read twice (three times for reverse KL and JSD, whose gradient needs their value first) and
its gradient written once, where eager arithmetic moves it some ten times. With V tokens, a position
costs 2 V reads of both models' fp32 logits and V fp16 writes: 18 V bytes, 2.3 MB at V = 128256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from paretron.distill.products import power_of_two

NONE, FORWARD, REVERSE, JSD = 0, 1, 2, 3

_BLOCK = 4096
_WARPS = 8
_LN2 = tl.constexpr(0.6931471805599453)
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def _capped(x: tl.tensor, cap: tl.tensor, CAP: tl.constexpr) -> tl.tensor:
    """cap * tanh(x / cap), where there is one."""
    if CAP:
        x = cap * (1 - 2 / (tl.exp(2 * x / cap) + 1))
    return x


@triton.jit
def _loaded(
    pointer: tl.tensor, columns: tl.tensor, vocab: tl.tensor, cap: tl.tensor, CAP: tl.constexpr
) -> tl.tensor:
    """A block of logits; what is no token has no probability."""
    inside = columns < vocab
    x = _capped(tl.load(pointer + columns, mask=inside, other=0.0), cap, CAP)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _grown(top: tl.tensor, total: tl.tensor, x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A running maximum and sum of exp(x - maximum), with a block more."""
    now = tl.maximum(top, tl.max(x, 0))
    return now, total * tl.exp(top - now) + tl.sum(tl.exp(x - now), 0)


@triton.jit
def _over_middle(ahead: tl.tensor) -> tl.tensor:
    """log(p / ((p + q) / 2)) = log(2 / (1 + q / p)), of log(q / p) of any size."""
    return _LN2 - (tl.maximum(ahead, 0.0) + tl.log(1 + tl.exp(-tl.abs(ahead))))


@triton.jit
def _row(
    student: tl.tensor,
    teacher: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    gradient: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    gradient_stride: tl.tensor,
    vocab: tl.tensor,
    inverse_temperature: tl.tensor,
    student_cap: tl.tensor,
    teacher_cap: tl.tensor,
    label_weight: tl.tensor,
    scale: tl.tensor,
    KIND: tl.constexpr,
    LABELS: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One position. Its gradient may lie in its own logits, which all threads have read by then."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    offsets = tl.arange(0, BLOCK)

    own_top, own_total = -float("inf"), 0.0
    other_top, other_total = -float("inf"), 0.0
    label_top, label_total = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK):
        own = _loaded(student, start + offsets, vocab, student_cap, STUDENT_CAP)
        if LABELS:
            label_top, label_total = _grown(label_top, label_total, own)
        if KIND != 0:
            own_top, own_total = _grown(own_top, own_total, own * inverse_temperature)
            other = _loaded(teacher, start + offsets, vocab, teacher_cap, TEACHER_CAP)
            other_top, other_total = _grown(other_top, other_total, other * inverse_temperature)

    label = tl.load(labels + row)
    loss = 0.0
    if LABELS:
        chosen = _capped(tl.load(student + label), student_cap, STUDENT_CAP)
        loss += label_weight * (label_top - chosen + tl.log(label_total))

    # log p_t - log p_s = (other - other_top) - (own - own_top) + apart: nothing large cancels.
    apart = 0.0
    of_own, of_other = 0.0, 0.0  # expectations that the gradient needs
    if KIND != 0:
        apart = tl.log(own_total) - tl.log(other_total)
    if KIND > 1:
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            own = _loaded(student, columns, vocab, student_cap, STUDENT_CAP)
            own = own * inverse_temperature - own_top
            other = _loaded(teacher, columns, vocab, teacher_cap, TEACHER_CAP)
            other = other * inverse_temperature - other_top
            ahead = tl.where(columns < vocab, other - own + apart, 0.0)
            if KIND == 2:
                of_own += tl.sum(tl.exp(own) * -ahead, 0)
            else:
                of_own += tl.sum(tl.exp(own) * _over_middle(ahead), 0)
                of_other += tl.sum(tl.exp(other) * _over_middle(-ahead), 0)
        of_own = of_own / own_total
        of_other = of_other / other_total
        if KIND == 2:
            loss += of_own
        else:
            loss += 0.5 * (of_own + of_other)

    if GRADIENT or KIND == 1:
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            inside = columns < vocab
            capped = _loaded(student, columns, vocab, student_cap, STUDENT_CAP)
            slope = tl.zeros([BLOCK], dtype=tl.float32)
            if KIND != 0:
                own = capped * inverse_temperature - own_top
                other = _loaded(teacher, columns, vocab, teacher_cap, TEACHER_CAP)
                other = other * inverse_temperature - other_top
                ahead = tl.where(inside, other - own + apart, 0.0)
                p = tl.exp(own) / own_total
                if KIND == 1:
                    q = tl.exp(other) / other_total
                    loss += tl.sum(q * ahead, 0)
                    slope += (p - q) * inverse_temperature
                elif KIND == 2:
                    slope -= p * (ahead + of_own) * inverse_temperature
                else:
                    slope += 0.5 * p * (_over_middle(ahead) - of_own) * inverse_temperature
            if GRADIENT:
                if LABELS:
                    p = tl.exp(capped - label_top) / label_total
                    slope += label_weight * (p - tl.where(columns == label, 1.0, 0.0))
                if STUDENT_CAP:
                    ratio = tl.where(inside, capped, 0.0) / student_cap
                    slope *= 1 - ratio * ratio
                slope *= scale
                if gradient.dtype.element_ty == tl.float16:
                    slope = tl.minimum(tl.maximum(slope, -_FP16_MAX), _FP16_MAX)
                tl.debug_barrier()
                tl.store(gradient + columns, slope, mask=inside)
    tl.store(losses + row, loss)


@dataclass(frozen=True)
class RowLoss:
    """A loss that the kernel knows: `kind` of divergence, and `labels` times the cross entropy."""

    kind: int
    temperature: float
    labels: float

    @property
    def steepest(self) -> float:
        """What no element of dLoss/dLogits exceeds.

        |p_s - p_t| <= 1. |p_s (log(p_s / m) - KL)| < 1, as log(p_s / m) <= log 2 and x log(1/x) <=
        1/e. Reverse KL knows no bound: its elements are cut off where the models are 1024 nats
        apart, which no two models are.
        """
        return {NONE: 0.0, FORWARD: 1.0, REVERSE: 1024.0, JSD: 1.0}[
            self.kind
        ] / self.temperature + (2.0 * self.labels)

    def __call__(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        *,
        caps: tuple[float | None, float | None],
        narrow: bool,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, float]:
        """The summed loss (fp64), dLoss/dLogits in the logits' own memory, and its scale.

        logits, teacher [positions, vocab] fp32, each row contiguous. The gradient is fp32 or, when
        `narrow`, fp16; times the scale it is the true one.
        """
        positions, vocab = logits.shape
        factor = power_of_two(self.steepest) if narrow else 1.0
        out = logits.view(torch.float16)[:, :vocab] if narrow else logits
        losses = torch.empty(positions, dtype=torch.float32, device=logits.device)
        other = logits if teacher is None else teacher
        student_cap, teacher_cap = caps
        _row[(positions,)](
            logits, other, labels, losses, out, logits.stride(0), other.stride(0), out.stride(0),
            vocab, 1 / self.temperature, student_cap or 1.0, teacher_cap or 1.0, self.labels,
            factor,
            KIND=self.kind, LABELS=self.labels != 0, STUDENT_CAP=student_cap is not None,
            TEACHER_CAP=teacher_cap is not None, GRADIENT=gradient, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        return losses.sum(dtype=torch.float64), out, 1 / factor
