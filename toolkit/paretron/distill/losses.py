"""Every loss, as plainly as its formula: the reference that the fused version is held to.

Each takes logits [positions, vocab] and returns the SUM over valid positions, computed in fp32 (or
fp64, where that comes in); who calls divides by the number of valid positions of the whole step.
"""

from __future__ import annotations

import math

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
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    return _counted((log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1), valid)


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(student || teacher) = sum_v p_s(v) (log p_s(v) - log p_t(v)) (Gu et al. 2023, MiniLLM)."""
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    return _counted((log_student.exp() * (log_student - log_teacher)).sum(dim=-1), valid)


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(KL(p_t || m) + KL(p_s || m)) / 2 with m = (p_t + p_s) / 2 (Lin 1991)."""
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    log_middle = torch.logaddexp(log_student, log_teacher) - math.log(2)
    teacher_part = log_teacher.exp() * (log_teacher - log_middle)
    student_part = log_student.exp() * (log_student - log_middle)
    return _counted((teacher_part + student_part).sum(dim=-1) / 2, valid)


def squared_error(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """sum_v (p_s(v) - p_t(v))^2: paper 1's MSE between the distributions, summed over v."""
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    return _counted((log_student.exp() - log_teacher.exp()).square().sum(dim=-1), valid)


def cosine(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """1 - cos(p_s, p_t): paper 1's cosine similarity between the distributions, as a loss."""
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    similarity = torch.cosine_similarity(log_student.exp(), log_teacher.exp(), dim=-1, eps=0.0)
    return _counted(1 - similarity, valid)


def weighted_soft_labels(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """(1 - exp(-CE_s / CE_t)) KL(teacher || student), the weight without a gradient.

    Positions that the student finds easy count less; CE is each model's own loss on the label, at
    temperature 1 (WSL-KD: Zhou et al. 2021, equation 10; without its factor tau^2, as elsewhere).
    """
    valid = labels != IGNORE
    student, teacher, chosen = student_logits[valid], teacher_logits[valid], labels[valid]
    own, other = (_label_loss(x.detach(), chosen) for x in (student, teacher))
    log_student, log_teacher = _both(student, teacher, temperature)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return ((1 - torch.exp(-own / other)) * divergence).sum()


def top_k_forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    valid: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Forward KL over the teacher's k likeliest tokens and one more event: all the others.

    What lies outside of the k is one probability for either model, so nothing is renormalised and
    k = vocab - 1 is the whole KL.
    """
    log_student, log_teacher = _both(student_logits, teacher_logits, temperature)
    top = log_teacher.topk(k, dim=-1).indices
    pairs = [(x.gather(-1, top), _log_rest(x, top)) for x in (log_student, log_teacher)]
    student, teacher = (torch.cat(pair, dim=-1) for pair in pairs)
    return _counted((teacher.exp() * (teacher - student)).sum(dim=-1), valid)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_CLM = -log p_s(label), over positions whose label is not IGNORE (paper 1, section 3)."""
    valid = labels != IGNORE
    log_probabilities = torch.log_softmax(_wide(logits[valid]), dim=-1)
    return -log_probabilities.gather(1, labels[valid].unsqueeze(1)).sum()


def _both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models; no gradient reaches the teacher."""
    return (
        torch.log_softmax(_wide(student) / temperature, dim=-1),
        torch.log_softmax(_wide(teacher.detach()) / temperature, dim=-1),
    )


def _counted(losses: Tensor, valid: Tensor | None) -> Tensor:
    return losses.sum() if valid is None else losses[valid].sum()


def _label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.log_softmax(_wide(logits), dim=-1).gather(1, labels.unsqueeze(1)).squeeze(1)


def _log_rest(log_probabilities: Tensor, top: Tensor) -> Tensor:
    """The log-probability of all tokens but `top`, [positions, 1]."""
    rest = log_probabilities.scatter(-1, top, -math.inf)
    return rest.logsumexp(dim=-1, keepdim=True)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
