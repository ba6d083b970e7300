"""The fused linear loss: hidden states and lm_heads in, loss and gradients out.

The logits of all positions would dwarf everything else in memory, so they exist for one chunk of
positions at a time, and the gradient is made from them in the same pass: the logits are overwritten
by dLoss/dLogits in closed form, which two products turn into the gradients of hidden states and
lm_head. Arithmetic is fp32 whatever comes in (`products` says how half-precision inputs keep it on
tensor cores); sums of losses are fp64.

Cost of N positions with V tokens, student width d and teacher width e: 2 N V (3 d + e) operations.
On CUDA memory moves 18 N V bytes for the loss itself (`kernels`), and for every chunk of n
positions, of which there are N / n, 2 V (d + e) for the weights, 6 V d to convert the student's and
8 V d to add to its gradient. At N = 8192, V = 128256, d = 3072, e = 4096 and n = 1024 that is 28
TFLOP and 19 + 59 GB; what lives besides inputs and gradients is 8 n V bytes of logits, 2 N d of
hidden states and 0.13 GB of weights, 1.2 GB in all. A gradient that is returned in bf16 is summed
in fp32 first, 4 V d bytes; under autocast a copy of fp32 weights adds 2 V d. (Counted, not
measured.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paretron.distill.chunks import ChunkLoss
from paretron.distill.divergences import CrossEntropy, Divergence, ForwardKL, over_shard
from paretron.distill.losses import IGNORE
from paretron.distill.products import Head, HeadGradients
from paretron.distill.top import TopTokens
from paretron.distill.vocabulary import WHOLE, Shard
from paretron.families.logits import PLAIN, LogitRule

# Logits alive at once: large enough for efficient products, small beside model and optimiser.
_CHUNK_ELEMENTS = {"cpu": 8 << 20, "cuda": 128 << 20}
_CUDA_TILE = 128  # what tiles of products there divide: positions of a chunk, width of its rows
_HALF = (torch.bfloat16, torch.float16)
_FORWARD_KL = ForwardKL()
_CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class DeferredLogits:
    """Logits that nobody has made yet, of hidden [..., d], weight [rows, d] and bias [rows].

    The family's rule caps or divides what the head gives. The first `tokens` rows are tokens (None:
    all of them); what pads the head beyond gets no probability. With a `shard` the rows are this
    process's alone, the first of them those of its tokens.
    """

    hidden: Tensor
    weight: Tensor
    rule: LogitRule = PLAIN
    bias: Tensor | None = None
    tokens: int | None = None
    shard: Shard | None = None

    @property
    def num_tokens(self) -> int:
        """How many rows are tokens."""
        if self.shard is not None:
            return self.shard.end - self.shard.start
        return len(self.weight) if self.tokens is None else self.tokens

    def logits(self) -> Tensor:
        """All of them at once, [..., tokens]: the plain way; those of a shard have no gradient."""
        weight = self.weight[: self.num_tokens]
        bias = None if self.bias is None else self.bias[: self.num_tokens]
        logits = self.rule(torch.nn.functional.linear(self.hidden, weight, bias))
        return logits if self.shard is None else self.shard.gathered(logits)

    def detach(self) -> DeferredLogits:
        """The same, through which no gradient flows."""
        return self._with(lambda tensor: tensor.detach())

    def at(self, positions: Tensor) -> DeferredLogits:
        """Those of some positions, int64 [n], of one dimension of positions."""
        return replace(self, hidden=self.hidden[positions])

    def flat(self) -> DeferredLogits:
        """The same with one dimension of positions."""
        return replace(self, hidden=self.hidden.flatten(0, -2))

    def wide(self) -> DeferredLogits:
        """The same in the precision of the arithmetic."""
        return self._with(lambda t: t if t.dtype == torch.float64 else t.float())

    def within(self, shard: Shard | None) -> DeferredLogits:
        """The same of a shard's tokens alone, where the rows are not those of a shard already."""
        if shard is None or self.shard is not None:
            return self
        rows = slice(shard.start, shard.end)
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], bias=bias, tokens=None, shard=shard)

    def head(self, tokens: int, dtype: torch.dtype) -> Head:
        """Its first `tokens` tokens as operands of products in `dtype`."""
        bias = None if self.bias is None else self.bias[:tokens].to(dtype)
        weight = self.weight[:tokens].to(dtype)
        return Head(self.hidden.to(dtype), weight, bias, self.rule.divisor)

    def _with(self, change: Callable[[Tensor], Tensor]) -> DeferredLogits:
        bias = None if self.bias is None else change(self.bias)
        return replace(self, hidden=change(self.hidden), weight=change(self.weight), bias=bias)


def fused_divergence(
    student: DeferredLogits,
    teacher: DeferredLogits | TopTokens,
    labels: Tensor,
    *,
    divergence: Divergence = _FORWARD_KL,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """How far the student is from the teacher, divided by `normaliser`; a scalar in fp64.

    labels [...] hold IGNORE where a position does not count. Gradients flow to the student's hidden
    states, weight and bias. `chunk` is the number of positions whose logits exist at once (default:
    by device). Only rows that are tokens in both heads take part. Where the student has the rows of
    a shard alone, every process gets the whole loss, and the whole gradient of hidden states.
    UNSUPPORTED where a divergence cannot be shared so.
    """
    return _fused(student, teacher, labels, divergence, normaliser, chunk)


def fused_cross_entropy(
    student: DeferredLogits,
    labels: Tensor,
    *,
    normaliser: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`losses.cross_entropy` of the logits, divided by `normaliser`; a scalar in fp64.

    labels [...] hold IGNORE where a position does not count; a shard as in `fused_divergence`.
    """
    return _fused(student, None, labels, _CROSS_ENTROPY, normaliser, chunk)


@dataclass(frozen=True)
class _Task:
    """What a call computes, of inputs through which no gradient flows."""

    student: Head
    teacher: Head | TopTokens | None
    loss: ChunkLoss
    rows: int  # of the student's weight, tokens or not
    factor: float  # of the gradient
    chunk: int
    shard: Shard | None

    def run(self, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, HeadGradients]:
        """The summed loss, and the wanted gradients of hidden states, weight and bias."""
        gradients = HeadGradients(self.student, rows=self.rows, wanted=wanted)
        narrow = self.student.weight.dtype in _HALF
        own = _buffer(self.student, self.chunk)
        other = own if self.teacher is None else _buffer(self.student, self.chunk)
        total = torch.zeros((), dtype=torch.float64, device=own.device)
        for start in range(0, len(self.student.hidden), self.chunk):
            positions = slice(start, start + self.chunk)
            logits = self.student.logits(positions, own)
            teacher = None if self.teacher is None else self.teacher.logits(positions, other)
            loss, gradient, scale = self.loss(
                logits, teacher, start=start, narrow=narrow, gradient=gradients.wanted
            )
            total += loss
            if gradients.wanted:
                gradients.add(gradient, start=start, scale=self.factor * scale)
        if self.shard is not None and gradients.hidden is not None:
            self.shard.total(gradients.hidden)
        return total, gradients


class _FusedLinearLoss(torch.autograd.Function):
    """loss(logits) / normaliser, all gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: _Task,
        normaliser: float,
    ) -> Tensor:
        total, gradients = task.run(ctx.needs_input_grad[:3])
        made = zip(
            (hidden, weight, bias),
            (gradients.hidden, gradients.weight, gradients.bias),
            strict=True,
        )
        ctx.save_for_backward(*(None if x is None or g is None else g.to(x.dtype) for x, g in made))
        return total / normaliser

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # A copy of the weight's gradient costs more than waiting for a scalar.
        if outputs[0].item() == 1.0:
            return (*ctx.saved_tensors, None, None)
        grads = (None if g is None else g * outputs[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*grads, None, None)


@torch.compiler.disable
def _fused(
    student: DeferredLogits,
    teacher: DeferredLogits | TopTokens | None,
    labels: Tensor,
    divergence: Divergence,
    normaliser: float,
    chunk: int | None,
) -> Tensor:
    """Only the positions that count, in chunks."""
    student, labels, shard = student.flat(), labels.flatten(), student.shard
    teacher = None if teacher is None else teacher.detach().flat()
    if isinstance(teacher, DeferredLogits):
        teacher = teacher.within(shard)
    valid = labels != IGNORE
    if not bool(valid.all()):
        positions = valid.nonzero().squeeze(1)
        student, labels = student.at(positions), labels[positions]
        teacher = None if teacher is None else teacher.at(positions)
    tokens = student.num_tokens
    if teacher is not None:
        tokens = min(tokens, teacher.num_tokens)
    if shard is not None:
        divergence = over_shard(divergence, shard)
    chunk = chunk or _chunk_positions(student.weight.device, tokens)
    if shard is not None:
        chunk = shard.least(chunk, labels.device)
    caps = student.rule.softcap, None if teacher is None else teacher.rule.softcap
    task = _Task(
        student=student.detach().head(tokens, product_dtype(student)),
        teacher=(
            teacher.head(tokens, product_dtype(teacher))
            if isinstance(teacher, DeferredLogits)
            else teacher  # what was captured has no head
        ),
        loss=ChunkLoss(divergence, labels, caps, WHOLE if shard is None else shard),
        rows=len(student.weight),
        factor=1 / (student.rule.divisor * normaliser),
        chunk=chunk,
        shard=shard,
    )
    with torch.autocast(student.hidden.device.type, enabled=False):
        apply: Callable[..., Tensor] = _FusedLinearLoss.apply
        return apply(student.hidden, student.weight, student.bias, task, normaliser)


def product_dtype(deferred: DeferredLogits) -> torch.dtype:
    """In which precision a head's operands are multiplied; sums are fp32, or fp64 as they are.

    Half precision where it comes in, or where autocast asks for it, on devices whose tensor cores
    sum it in fp32; elsewhere it would save nothing.
    """
    hidden, weight = deferred.hidden, deferred.weight
    if torch.float64 in (hidden.dtype, weight.dtype):
        return torch.float64
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) >= (8, 0):
        if torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in _HALF:
            return torch.get_autocast_dtype("cuda")
        if hidden.dtype == weight.dtype and hidden.dtype in _HALF:
            return hidden.dtype
    return torch.float32


def _chunk_positions(device: torch.device, tokens: int) -> int:
    positions = max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"]) // tokens)
    whole_tiles = device.type == "cuda" and positions > _CUDA_TILE
    return positions // _CUDA_TILE * _CUDA_TILE if whole_tiles else positions


def _buffer(head: Head, chunk: int) -> Tensor:
    """Room for a chunk's logits, [positions, tokens]."""
    device, tokens = head.hidden.device, len(head.weight)
    # Rows that start at round addresses keep every product on its fast path.
    width = -(-tokens // _CUDA_TILE) * _CUDA_TILE if device.type == "cuda" else tokens
    rows = min(chunk, len(head.hidden))
    return torch.empty(rows, width, dtype=head.wide, device=device)[:, :tokens]
