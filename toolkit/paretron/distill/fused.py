"""The fused linear loss: hidden states and lm_heads in, loss and gradients out.

The logits of all positions would dwarf everything else in memory, so they exist for one chunk of
positions at a time, and the gradient is made from them in the same pass: the logits are overwritten
by dLoss/dLogits in closed form, which two products turn into the gradients of hidden states and
lm_head. Arithmetic is fp32 whatever comes in; sums of losses are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from paretron.distill.divergences import Divergence, ForwardKL
from paretron.distill.losses import IGNORE
from paretron.families.logits import PLAIN, LogitRule

# Logits alive at once: large enough for efficient products, small beside model and optimiser.
_CHUNK_ELEMENTS = {"cpu": 8 << 20, "cuda": 128 << 20}
# Element-wise work on the CPU goes block by block, so that a block stays in the cache of a core.
_CPU_BLOCK_ELEMENTS = 128 << 10
_FORWARD_KL = ForwardKL()


@dataclass(frozen=True)
class DeferredLogits:
    """Logits that nobody has made yet, of hidden [..., d] and weight [vocab, d].

    The family's rule caps or divides what the head gives.
    """

    hidden: Tensor
    weight: Tensor
    rule: LogitRule = PLAIN

    def logits(self) -> Tensor:
        """All of them at once, [..., vocab]: the plain way."""
        return self.rule(self.hidden @ self.weight.t())

    def detach(self) -> DeferredLogits:
        """The same, through which no gradient flows."""
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach())

    def at(self, positions: Tensor) -> DeferredLogits:
        """Those of some positions, int64 [n], of one dimension of positions."""
        return replace(self, hidden=self.hidden[positions])

    def flat(self) -> DeferredLogits:
        """The same with one dimension of positions."""
        return replace(self, hidden=self.hidden.flatten(0, -2))

    def wide(self) -> DeferredLogits:
        """The same in the precision of the arithmetic."""
        return replace(self, hidden=_wide(self.hidden), weight=_wide(self.weight))


class LogitLoss(Protocol):
    """A loss of a chunk of logits: its sum, while the logits become its gradient in place."""

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        """`start` is the chunk's first position; without `gradient` the logits may hold junk."""


def fused_divergence(
    student: DeferredLogits,
    teacher: DeferredLogits,
    labels: Tensor,
    *,
    divergence: Divergence = _FORWARD_KL,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from the teacher, divided by `normaliser`; a scalar in fp64.

    labels [...] hold IGNORE where a position does not count. Gradients flow to the student's hidden
    states and weight. `chunk` is the number of positions whose logits exist at once (default: by
    device).
    """
    student, teacher, labels = _valid(student, teacher.detach(), labels)
    chunk = chunk or _chunk_positions(student.weight)
    loss = _Distance(teacher.wide(), labels, divergence, _buffer(student, chunk))
    return _apply(student, loss, normaliser, chunk)


def fused_cross_entropy(
    student: DeferredLogits,
    labels: Tensor,
    *,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`losses.cross_entropy` of the logits, divided by `normaliser`; a scalar in fp64.

    labels [...] hold IGNORE where a position does not count.
    """
    student, _, labels = _valid(student, student.detach(), labels)
    chunk = chunk or _chunk_positions(student.weight)
    return _apply(student, _CrossEntropy(labels), normaliser, chunk)


@dataclass(frozen=True)
class _Distance:
    """A divergence from a teacher whose logits are made chunk by chunk, into one buffer."""

    teacher: DeferredLogits
    labels: Tensor
    divergence: Divergence
    buffer: Tensor

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        positions = slice(start, start + len(logits))
        teacher = _product(self.teacher, positions, self.buffer)
        if (softcap := self.teacher.rule.softcap) is not None:
            teacher.div_(softcap).tanh_().mul_(softcap)
        size = _block_positions(logits)
        parts = zip(
            logits.split(size), teacher.split(size), self.labels[positions].split(size), strict=True
        )
        return torch.stack([self.divergence(*part, gradient=gradient) for part in parts]).sum()


@dataclass(frozen=True)
class _CrossEntropy:
    """-log p(label); its gradient in the logits is p - onehot(label)."""

    labels: Tensor

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        labels = self.labels[start : start + len(logits)].unsqueeze(1)
        size = _block_positions(logits)
        parts = zip(logits.split(size), labels.split(size), strict=True)
        return torch.stack([self._block(x, y, gradient) for x, y in parts]).sum()

    @staticmethod
    def _block(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True))
        chosen = logits.gather(1, labels)
        z = logits.exp_().sum(1, keepdim=True)
        if gradient:
            logits.div_(z).scatter_add_(1, labels, -torch.ones_like(z))
        return (z.log() - chosen).sum(dtype=torch.float64)


class _FusedLinearLoss(torch.autograd.Function):
    """loss(logits) / normaliser, both gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        student: DeferredLogits,
        loss: LogitLoss,
        normaliser: float,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide = student.wide()
        grad_hidden = torch.empty_like(wide.hidden) if wants_hidden else None
        grad_weight = torch.empty_like(wide.weight) if wants_weight else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        buffer = _buffer(student, chunk)
        scale = 1 / (wide.rule.divisor * normaliser)
        for start in range(0, len(hidden), chunk):
            positions = slice(start, start + chunk)
            logits = _product(wide, positions, buffer)
            slope = None if wide.rule.softcap is None else _cap(logits, wide.rule.softcap)
            total += loss(logits, start=start, gradient=wants_hidden or wants_weight)
            if slope is not None:
                logits.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[positions].addmm_(logits, wide.weight, beta=0, alpha=scale)
            if grad_weight is not None:
                # beta=0 reads nothing, so the first chunk fills the uninitialised memory.
                part = wide.hidden[positions]
                grad_weight.addmm_(logits.t(), part, beta=min(start, 1), alpha=scale)
        if grad_weight is not None and not len(hidden):
            grad_weight.zero_()
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Reading a scalar is free on the CPU; elsewhere it would stall the queue.
        if outputs[0].device.type == "cpu" and outputs[0].item() == 1.0:
            return (*ctx.saved_tensors, None, None, None, None)
        grads = (None if g is None else g * outputs[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _apply(student: DeferredLogits, loss: LogitLoss, normaliser: float, chunk: int) -> Tensor:
    with torch.autocast(student.hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _FusedLinearLoss.apply
        detached = student.detach()
        return apply(student.hidden, student.weight, detached, loss, normaliser, chunk)


def _valid(
    student: DeferredLogits, teacher: DeferredLogits, labels: Tensor
) -> tuple[DeferredLogits, DeferredLogits, Tensor]:
    """Only the positions that count, in one dimension."""
    student, teacher, labels = student.flat(), teacher.flat(), labels.flatten()
    valid = labels != IGNORE
    if bool(valid.all()):
        return student, teacher, labels
    positions = valid.nonzero().squeeze(1)
    return student.at(positions), teacher.at(positions), labels[positions]


def _product(deferred: DeferredLogits, positions: slice, buffer: Tensor) -> Tensor:
    """hidden @ weight.T / divisor of some positions, written into the first rows of the buffer."""
    part, weight = deferred.hidden[positions], deferred.weight
    return buffer[: len(part)].addmm_(part, weight.t(), beta=0, alpha=1 / deferred.rule.divisor)


def _cap(logits: Tensor, softcap: float) -> Tensor:
    """Cap the logits in place; the cap's slope where each of them lies."""
    logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    logits.mul_(softcap)
    return slope


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunk_positions(weight: Tensor) -> int:
    budget = _CHUNK_ELEMENTS.get(weight.device.type, _CHUNK_ELEMENTS["cuda"])
    return max(1, budget // len(weight))


def _buffer(student: DeferredLogits, chunk: int) -> Tensor:
    hidden, weight = student.hidden, student.weight
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty(min(chunk, len(hidden)), len(weight), dtype=dtype, device=hidden.device)


def _block_positions(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(1, len(logits))  # there, launches cost more than caches save
    return max(1, _CPU_BLOCK_ELEMENTS // logits.shape[1])
