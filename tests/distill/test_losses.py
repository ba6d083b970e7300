from __future__ import annotations

import math

import pytest
import torch

from paretron.distill.losses import IGNORE, cross_entropy, forward_kl


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("positions", "vocab"), [(1, 2), (7, 252), (33, 507)])
def test_forward_kl_equals_its_definition_in_fp64(
    positions: int, vocab: int, temperature: float
) -> None:
    torch.manual_seed(positions)
    student, teacher = 4 * torch.randn(2, positions, vocab, dtype=torch.float64)
    p = (teacher / temperature).exp() / (teacher / temperature).exp().sum(-1, keepdim=True)
    q = (student / temperature).exp() / (student / temperature).exp().sum(-1, keepdim=True)
    expected = float((p * (p / q).log()).sum())
    exact = forward_kl(student, teacher, temperature=temperature)
    single = forward_kl(student.float(), teacher.float(), temperature=temperature)
    assert exact.dtype == torch.float64
    assert single.dtype == torch.float32
    assert math.isclose(float(exact), expected, rel_tol=1e-9)
    assert math.isclose(float(single), expected, rel_tol=1e-4)


def test_forward_kl_is_zero_at_the_teacher_and_positive_elsewhere() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 31)
    assert float(forward_kl(logits, logits.clone())) == 0.0
    assert float(forward_kl(logits + torch.randn(5, 31), logits)) > 0.1


def test_forward_kl_counts_valid_positions_only_and_leaves_the_teacher_alone() -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 11, requires_grad=True)
    teacher = torch.randn(6, 11, requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, False])
    loss = forward_kl(student, teacher, valid=valid)
    loss.backward()
    assert math.isclose(loss.item(), forward_kl(student[valid], teacher[valid]).item())
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad[~valid].abs().max()) == 0.0


@pytest.mark.parametrize(("positions", "vocab"), [(1, 2), (7, 252), (33, 507)])
def test_cross_entropy_equals_its_definition_in_fp64(positions: int, vocab: int) -> None:
    torch.manual_seed(positions)
    logits = 4 * torch.randn(positions, vocab, dtype=torch.float64)
    labels = torch.randint(vocab, (positions,))
    labels[1::3] = IGNORE
    expected = sum(
        float(logits[i].exp().sum().log() - logits[i, y])
        for i, y in enumerate(labels.tolist())
        if y != IGNORE
    )
    assert math.isclose(float(cross_entropy(logits, labels)), expected, rel_tol=1e-9)
    assert math.isclose(float(cross_entropy(logits.float(), labels)), expected, rel_tol=1e-4)


def test_nothing_valid_is_no_loss() -> None:
    labels = torch.full((4,), IGNORE)
    logits = torch.randn(4, 9)
    assert float(cross_entropy(logits, labels)) == 0.0
    assert float(forward_kl(logits, -logits, valid=labels != IGNORE)) == 0.0
