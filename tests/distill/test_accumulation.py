"""Preflight: four micro-batches must teach what their batch teaches at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.artifacts.models import load_model
from paretron.data.store import TokenStore
from paretron.distill.batches import Windows
from paretron.distill.objective import Objective
from paretron.distill.preflight import check_before_training
from paretron.errors import Code, ParetronError


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_whose_windows_depend_on_each_other_is_found(
    pico: PicoMaker, tokens: Path, family: str
) -> None:
    batch = Windows(TokenStore.open(tokens), 32, 320).batch(range(2))
    student = load_model(pico(family, num_hidden_layers=2))
    objective = Objective(student)
    check_before_training(objective, None, batch, untrained=True)
    mlp = student.base_model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x - x.mean(dim=0, keepdim=True))
    with pytest.raises(ParetronError) as caught:
        check_before_training(objective, None, batch, untrained=True)
    (problem,) = caught.value.problems
    assert problem.code is Code.GATE_PREFLIGHT
    assert "the gradients of 4 micro-batches differ" in problem.cause
    assert all(p.grad is None for p in objective.parameters())
