"""A pair of models, a batch, a loss: what one step of distillation computes."""

from __future__ import annotations

import pytest
import torch

from losscases import LOSSES
from paretron.distill.batches import Batch
from paretron.distill.losses import IGNORE
from paretron.distill.objective import Objective, Teacher
from pico import pico_model

FAMILIES = ("llama", "qwen3", "gemma2", "granite", "nemotron", "mixtral")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_equals_the_formula_on_the_models_own_logits(family: str, loss: str) -> None:
    closed, plain = LOSSES[loss]
    teacher = pico_model(family, num_hidden_layers=2, seed=1)
    student = pico_model(family, num_hidden_layers=1, seed=2)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    labels = torch.full_like(ids, IGNORE)
    labels[:, :-1] = ids[:, 1:]
    labels[0, 4:] = IGNORE
    count = int((labels != IGNORE).sum())

    objective = Objective(student, divergence=closed(2.0))
    batch = Batch(ids, labels, (0, 1))
    found, _ = objective(batch, Teacher(teacher).predict(batch), float(count))
    found.backward()
    gradients = {n: p.grad for n, p in student.named_parameters()}
    student.zero_grad(set_to_none=True)

    with torch.no_grad():
        wanted = teacher(ids, use_cache=False).logits.flatten(0, 1)
    own = student(ids, use_cache=False).logits.flatten(0, 1)
    expected = plain(own, wanted, labels.flatten(), 2.0) / count
    expected.backward()
    assert abs(float(found.detach()) / float(expected.detach()) - 1) < 1e-4
    for name, parameter in student.named_parameters():
        gradient = gradients[name]
        assert gradient is not None, name
        assert parameter.grad is not None, name
        scale = float(parameter.grad.abs().max())
        assert scale > 0, f"{name} learns nothing"
        assert float((gradient - parameter.grad).abs().max()) < 2e-3 * scale, name
