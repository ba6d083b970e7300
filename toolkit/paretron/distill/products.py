"""The matrix products of the fused loss: logits of a chunk, and what its gradient makes.

fp32 and fp64 operands are multiplied as they are. Half-precision operands go to the tensor cores,
which sum in fp32, and so does all that follows:

- Logits: products of bf16 or fp16 numbers are exact in fp32.
- dLogits rounded to bf16 (2^-8 of an element at worst) would put gradients 1.6e-3 from those of
  fp64. They are written as fp16 (2^-11, gradients 2e-4), times a power of two that brings the
  largest element that there can be to at most 2^15; one too small for fp16 then loses 2^-40 of that
  largest. Without that factor a student close to its teacher would be off by 7e-3.
- The other operand must then be fp16 too. Its 11 bits hold the 8 of bf16, and a power of two brings
  its largest element to 2^15, so that only elements below 2^-29 of it lose bits. Hidden states are
  converted once, the weight block by block, so that there is no copy of it.
- Gradients are summed in fp32 over chunks and rounded once, to the dtype of what they belong to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FP16_TOP = 2.0**15  # the magnitude that the largest element is brought to; fp16 ends at 65504
_BLOCK_ELEMENTS = 64 << 20  # of the weight that are there in fp16 at a time


@dataclass(frozen=True)
class Head:
    """hidden [positions, d], weight [tokens, d] and bias [tokens] or None, in one precision.

    logits = (hidden weight^T + bias) / divisor, before any cap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    divisor: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums: logits and gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    def logits(self, positions: slice, buffer: Tensor) -> Tensor:
        """Those of some positions, written into the first rows of the buffer."""
        part = self.hidden[positions]
        logits = buffer[: len(part)]
        add_product(logits, part, self.weight.t(), keep=False, scale=1 / self.divisor)
        return logits if self.bias is None else logits.add_(self.bias, alpha=1 / self.divisor)


class HeadGradients:
    """What the chunks' dLoss/dLogits add up to: gradients of hidden states, weight and bias.

    Of the weight's `rows`, those beyond the head's tokens get zero. A gradient that nobody wants is
    None.
    """

    def __init__(self, head: Head, *, rows: int, wanted: tuple[bool, bool, bool]) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=head.wide, device=head.hidden.device)

        tokens, size = head.weight.shape
        self.head = head
        self.hidden = empty(*head.hidden.shape) if wanted[0] else None
        self.weight = empty(rows, size) if wanted[1] else None
        self.bias = torch.zeros_like(empty(rows)) if wanted[2] else None
        if self.weight is not None:
            # The first chunk's product fills the rest, so that nothing large is written twice.
            self.weight[tokens if len(head.hidden) else 0 :].zero_()
        self._narrow_hidden: tuple[Tensor, float] | None = None

    @property
    def wanted(self) -> bool:
        """Whether any gradient is."""
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, gradient: Tensor, *, start: int, scale: float) -> None:
        """A chunk's dLoss/dLogits [positions, tokens] from position `start`, times 1 / `scale`."""
        positions = slice(start, start + len(gradient))
        tokens = gradient.shape[1]
        if self.hidden is not None:
            self._add_to_hidden(gradient, self.hidden[positions], scale)
        if self.weight is not None:
            part, unit = self._hidden_as(gradient.dtype)
            out = self.weight[:tokens]
            add_product(out, gradient.t(), part[positions], keep=start > 0, scale=scale / unit)
        if self.bias is not None:
            self.bias[:tokens].add_(gradient.sum(0, dtype=self.head.wide), alpha=scale)

    def _add_to_hidden(self, gradient: Tensor, out: Tensor, scale: float) -> None:
        weight = self.head.weight
        if gradient.dtype == weight.dtype:
            add_product(out, gradient, weight, keep=False, scale=scale)
            return
        rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
        unit = self._weight_unit
        for first in range(0, len(weight), rows):
            block = slice(first, first + rows)
            narrow = as_fp16(weight[block], unit)
            add_product(out, gradient[:, block], narrow, keep=first > 0, scale=scale / unit)

    def _hidden_as(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Hidden states in the dtype of a gradient, and what they were multiplied with."""
        if self.head.hidden.dtype == dtype:
            return self.head.hidden, 1.0
        if self._narrow_hidden is None:
            unit = unit_of(self.head.hidden)
            self._narrow_hidden = as_fp16(self.head.hidden, unit), unit
        return self._narrow_hidden

    @cached_property
    def _weight_unit(self) -> float:
        return unit_of(self.head.weight)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool, scale: float) -> None:
    """out = keep * out + scale * a @ b, in place; summed in the dtype of `out`.

    Without `keep`, nothing is read from `out`.
    """
    beta = float(keep)
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta, alpha=scale)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:  # the same numbers: only the processor knows no such product
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=scale)


def power_of_two(largest: float) -> float:
    """What brings a magnitude to at most FP16_TOP, without rounding anything."""
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(FP16_TOP / largest))


def unit_of(tensor: Tensor) -> float:
    """The power of two that brings a tensor's largest element to at most FP16_TOP."""
    return power_of_two(float(torch.linalg.vector_norm(tensor, math.inf)))


def as_fp16(tensor: Tensor, unit: float) -> Tensor:
    """The tensor times `unit`, rounded once."""
    narrow = torch.empty_like(tensor, dtype=torch.float16)
    return torch.mul(tensor, unit, out=narrow)
