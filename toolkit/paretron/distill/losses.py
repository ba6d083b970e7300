"""Every loss, as plainly as its formula: the reference that the fused version is held to.

Each takes logits [positions, vocab] and returns the SUM over valid positions, computed in fp32 (or
fp64, where that comes in); who calls divides by the number of valid positions of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # the label of a position that does not count


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) = sum_v p_t(v) (log p_t(v) - log p_s(v)), p = softmax(logits / tau).

    `valid` is a bool mask of positions. As in paper 1, section 3 (logit-based loss), there is no
    factor tau^2. The teacher gets no gradient.
    """
    log_student = torch.log_softmax(_wide(student_logits) / temperature, dim=-1)
    log_teacher = torch.log_softmax(_wide(teacher_logits.detach()) / temperature, dim=-1)
    loss = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return loss.sum() if valid is None else loss[valid].sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CLM = -log p_s(label), over positions whose label is not IGNORE (paper 1, section 3)."""
    valid = labels != IGNORE
    log_probabilities = torch.log_softmax(_wide(logits[valid]), dim=-1)
    return -log_probabilities.gather(1, labels[valid].unsqueeze(1)).sum()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
