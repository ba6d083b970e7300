"""Every closed form against its plain formula in fp64: value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losscases import LOSSES
from paretron.distill import losses
from paretron.distill.divergences import divergence_of
from paretron.recipe.training import Loss


def drawn(positions: int, vocab: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(positions * vocab)
    # Numbers that fp32 can hold, so that both precisions start from the same.
    student, teacher = scale * torch.randn(2, positions, vocab, generator=random).double()
    return student, teacher, torch.randint(vocab, (positions,), generator=random)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("positions", "vocab"), [(1, 7), (7, 253), (33, 507)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_against_fp64(
    name: str, positions: int, vocab: int, temperature: float
) -> None:
    closed, plain = LOSSES[name]
    student, teacher, labels = drawn(positions, vocab)
    leaf = student.clone().requires_grad_()
    expected = plain(leaf, teacher, labels, temperature)
    (gradient,) = torch.autograd.grad(expected, leaf)
    expected = expected.detach()
    for dtype, value_error, gradient_error in (
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-5, 5e-5),
    ):
        block = student.to(dtype, copy=True)
        found = closed(temperature)(block, teacher.to(dtype, copy=True), labels, gradient=True)
        assert found.dtype == torch.float64
        assert float((found - expected).abs() / expected.abs()) < value_error
        worst = float((block.double() - gradient).abs().max() / gradient.abs().max())
        assert worst < gradient_error


@pytest.mark.parametrize("name", LOSSES)
def test_the_value_needs_no_gradient(name: str) -> None:
    closed, plain = LOSSES[name]
    student, teacher, labels = drawn(5, 61)
    expected = plain(student, teacher, labels, 1.0)
    found = closed(1.0)(student.clone(), teacher.clone(), labels, gradient=False)
    assert float((found - expected).abs()) < 1e-12


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("wsl_kd", "with_labels")])
def test_nothing_is_lost_at_the_teacher(name: str) -> None:
    student, _, labels = drawn(5, 61)
    block = student.float()
    loss = LOSSES[name][0](1.0)(block, student.float(), labels, gradient=True)
    assert abs(float(loss)) < 1e-5
    assert float(block.abs().max()) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name: str) -> None:
    """Logits of hundreds, as bf16 models make them, and models that disagree entirely."""
    student, teacher, labels = (
        x if x.dtype == torch.int64 else x.float() for x in drawn(9, 31, 90)
    )
    loss = LOSSES[name][0](0.5)(student, teacher, labels, gradient=True)
    assert torch.isfinite(loss)
    assert torch.isfinite(student).all()


def test_the_whole_vocabulary_but_one_is_the_whole_divergence() -> None:
    student, teacher, _ = drawn(6, 12)
    whole = losses.forward_kl(student, teacher)
    assert torch.allclose(losses.top_k_forward_kl(student, teacher, k=11), whole)
    assert losses.top_k_forward_kl(student, teacher, k=3) < whole  # events were joined


NAMED: dict[str, dict[str, object]] = {
    "top_k": {"top_k": 3},
    "with_labels": {"logits": "reverse_kl", "labels": 0.3},
}


def test_a_recipe_names_every_loss() -> None:
    student, teacher, labels = drawn(4, 23)
    for name, (closed, _) in LOSSES.items():
        loss = Loss.model_validate(NAMED.get(name, {"logits": name}) | {"temperature": 2.0})
        found, expected = (
            divergence(student.clone(), teacher.clone(), labels, gradient=False)
            for divergence in (divergence_of(loss), closed(2.0))
        )
        assert torch.equal(found, expected)
