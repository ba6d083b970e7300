"""The fused linear loss: hidden states and lm_heads in, loss and gradients out.

The logits of all positions would dwarf everything else in memory, so they exist for one chunk of
positions at a time, and the gradient is made from them in the same pass: the logits are overwritten
by dLoss/dLogits in closed form, which two products turn into the gradients of hidden states and
lm_head. Arithmetic is fp32 whatever comes in; sums of losses are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from paretron.distill.losses import IGNORE

# Logits alive at once: large enough for efficient products, small beside model and optimiser.
_CHUNK_ELEMENTS = {"cpu": 8 << 20, "cuda": 128 << 20}
# Element-wise work on the CPU goes block by block, so that a block stays in the cache of a core.
_CPU_BLOCK_ELEMENTS = 128 << 10


class LogitLoss(Protocol):
    """A loss of a chunk of logits: its sum, while the logits become its gradient in place."""

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        """`start` is the chunk's first position; without `gradient` the logits may hold junk."""


def fused_forward_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`losses.forward_kl` of the lm_heads' logits, divided by `normaliser`; a scalar in fp64.

    hidden [..., d_student], weight [vocab, d_student], teacher_hidden [..., d_teacher],
    teacher_weight [vocab, d_teacher], valid [...] bool. Gradients flow to hidden and weight.
    `chunk` is the number of positions whose logits exist at once (default: by device).
    """
    hidden, teacher_hidden = hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    if valid is not None and not bool(valid.all()):
        positions = valid.flatten().nonzero().squeeze(1)
        hidden, teacher_hidden = hidden[positions], teacher_hidden[positions]
    chunk = chunk or _chunk_positions(weight)
    loss = _ForwardKL(
        _wide(teacher_hidden),
        _wide(teacher_weight.detach()),
        scale=1 / temperature,
        buffer=_buffer(hidden, weight, chunk),
    )
    return _apply(hidden, weight, loss, 1 / temperature, normaliser, chunk)


def fused_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`losses.cross_entropy` of the lm_head's logits, divided by `normaliser`; a scalar in fp64.

    hidden [..., d], weight [vocab, d], labels [...] with IGNORE where a position does not count.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    valid = labels != IGNORE
    if not bool(valid.all()):
        positions = valid.nonzero().squeeze(1)
        hidden, labels = hidden[positions], labels[positions]
    chunk = chunk or _chunk_positions(weight)
    return _apply(hidden, weight, _CrossEntropy(labels), 1.0, normaliser, chunk)


@dataclass(frozen=True)
class _ForwardKL:
    """KL(teacher || student); its gradient in the student's logits is p_student - p_teacher."""

    teacher_hidden: Tensor
    teacher_weight: Tensor
    scale: float
    buffer: Tensor

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        part = self.teacher_hidden[start : start + len(logits)]
        teacher = _product(part, self.teacher_weight, self.scale, self.buffer)
        pairs = zip(_blocks(logits), _blocks(teacher), strict=True)
        return torch.stack([self._block(s, t, gradient) for s, t in pairs]).sum()

    @staticmethod
    def _block(student: Tensor, teacher: Tensor, gradient: bool) -> Tensor:
        # Both maxima are taken out first, so nothing large cancels where the two models agree.
        student.sub_(student.amax(1, keepdim=True))
        teacher.sub_(teacher.amax(1, keepdim=True))
        difference = teacher - student
        z_student = student.exp_().sum(1, keepdim=True)
        z_teacher = teacher.exp_().sum(1, keepdim=True)
        expected = difference.mul_(teacher).sum(1, keepdim=True).div_(z_teacher)
        if gradient:
            student.div_(z_student).addcmul_(teacher, z_teacher.reciprocal(), value=-1)
        return expected.add_(z_student.log() - z_teacher.log()).sum(dtype=torch.float64)


@dataclass(frozen=True)
class _CrossEntropy:
    """-log p(label); its gradient in the logits is p - onehot(label)."""

    labels: Tensor

    def __call__(self, logits: Tensor, *, start: int, gradient: bool) -> Tensor:
        labels = self.labels[start : start + len(logits)].unsqueeze(1)
        pairs = zip(_blocks(logits), labels.split(_block_positions(logits)), strict=True)
        return torch.stack([self._block(x, y, gradient) for x, y in pairs]).sum()

    @staticmethod
    def _block(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
        logits.sub_(logits.amax(1, keepdim=True))
        chosen = logits.gather(1, labels)
        z = logits.exp_().sum(1, keepdim=True)
        if gradient:
            logits.div_(z).scatter_add_(1, labels, -torch.ones_like(z))
        return (z.log() - chosen).sum(dtype=torch.float64)


class _FusedLinearLoss(torch.autograd.Function):
    """loss(scale * hidden @ weight.T) / normaliser, both gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: LogitLoss,
        scale: float,
        normaliser: float,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        wide_hidden, wide_weight = _wide(hidden), _wide(weight)
        grad_hidden = torch.empty_like(wide_hidden) if wants_hidden else None
        grad_weight = torch.empty_like(wide_weight) if wants_weight else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        buffer = _buffer(hidden, weight, chunk)
        for start in range(0, len(hidden), chunk):
            part = wide_hidden[start : start + chunk]
            logits = _product(part, wide_weight, scale, buffer)
            total += loss(logits, start=start, gradient=wants_hidden or wants_weight)
            if grad_hidden is not None:
                out = grad_hidden[start : start + chunk]
                out.addmm_(logits, wide_weight, beta=0, alpha=scale / normaliser)
            if grad_weight is not None:
                # beta=0 reads nothing, so the first chunk fills the uninitialised memory.
                beta = min(start, 1)
                grad_weight.addmm_(logits.t(), part, beta=beta, alpha=scale / normaliser)
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


def _apply(
    hidden: Tensor, weight: Tensor, loss: LogitLoss, scale: float, normaliser: float, chunk: int
) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _FusedLinearLoss.apply
        return apply(hidden, weight, loss, scale, normaliser, chunk)


def _product(hidden: Tensor, weight: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """scale * hidden @ weight.T, written into the first rows of the buffer."""
    return buffer[: len(hidden)].addmm_(hidden, weight.t(), beta=0, alpha=scale)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunk_positions(weight: Tensor) -> int:
    budget = _CHUNK_ELEMENTS.get(weight.device.type, _CHUNK_ELEMENTS["cuda"])
    return max(1, budget // len(weight))


def _buffer(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.empty(min(chunk, len(hidden)), len(weight), dtype=dtype, device=hidden.device)


def _block_positions(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(1, len(logits))  # there, launches cost more than caches save
    return max(1, _CPU_BLOCK_ELEMENTS // logits.shape[1])


def _blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(_block_positions(logits))
