"""What a chunk of logits loses: by the kernel where there is one, else in closed form, eagerly."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paretron.distill.divergences import (
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    WithLabels,
)
from paretron.distill.products import as_fp16, unit_of
from paretron.distill.vocabulary import WHOLE, Vocabulary

if TYPE_CHECKING:
    from paretron.distill.kernels import RowLoss

# Element-wise work on the CPU goes block by block, so that a block stays in the cache of a core.
_CPU_BLOCK_ELEMENTS = 128 << 10


@dataclass(frozen=True)
class ChunkLoss:
    """A loss of the student's logits; `caps` bound the student's and the teacher's.

    labels [positions], none ignored.
    """

    divergence: Divergence
    labels: Tensor
    caps: tuple[float | None, float | None]
    vocabulary: Vocabulary

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, *, start: int, narrow: bool, gradient: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The summed loss (fp64), dLoss/dLogits and its scale; both models' logits are used up.

        Logits [positions, tokens] from position `start`, before the caps. The gradient is fp32 or,
        when `narrow`, fp16; times the scale it is the true one. Without `gradient` it is junk.
        """
        labels = self.labels[start : start + len(logits)]
        if self.kernel is not None and logits.dtype == torch.float32:
            return self.kernel(
                logits, teacher, labels, caps=self.caps, narrow=narrow, gradient=gradient
            )
        return self._eagerly(logits, teacher, labels, narrow=narrow, gradient=gradient)

    @cached_property
    def kernel(self) -> RowLoss | None:
        """The kernel for this loss, where it runs and knows it."""
        runs = self.labels.is_cuda and importlib.util.find_spec("triton") is not None
        return row_loss(self.divergence) if runs and self.vocabulary is WHOLE else None

    def _eagerly(
        self,
        logits: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        *,
        narrow: bool,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, float]:
        slope = _capped(logits, self.caps[0], slope=gradient)
        if teacher is None:
            teacher = logits[:, :0]
        else:
            _capped(teacher, self.caps[1], slope=False)
        size = _block_positions(logits) if self.vocabulary is WHOLE else len(logits)
        parts = zip(logits.split(size), teacher.split(size), labels.split(size), strict=True)
        losses = [self.divergence(*part, gradient=gradient) for part in parts]
        loss = torch.stack(losses).sum()
        if slope is not None:
            logits.mul_(slope)
        if not (narrow and gradient):
            return loss, logits, 1.0
        unit = unit_of(logits)
        return loss, as_fp16(logits, unit), 1 / unit


def row_loss(divergence: Divergence) -> RowLoss | None:
    """The kernel's form of a divergence, where it has one."""
    from paretron.distill import kernels

    if isinstance(divergence, CrossEntropy):
        return kernels.RowLoss(kernels.NONE, 1.0, 1.0)
    labels = 0.0
    if isinstance(divergence, WithLabels):
        labels, divergence = divergence.weight, divergence.divergence
    kinds = {ForwardKL: kernels.FORWARD, ReverseKL: kernels.REVERSE, JensenShannon: kernels.JSD}
    for known, kind in kinds.items():
        if isinstance(divergence, known):
            return kernels.RowLoss(kind, divergence.temperature, labels)
    return None


def _capped(logits: Tensor, softcap: float | None, *, slope: bool) -> Tensor | None:
    """Cap the logits in place; when asked, the cap's slope where each of them lies."""
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slopes = 1 - logits.square() if slope else None
    logits.mul_(softcap)
    return slopes


def _block_positions(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(1, len(logits))  # there, launches cost more than caches save
    return max(1, _CPU_BLOCK_ELEMENTS // logits.shape[1])
