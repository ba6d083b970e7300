"""Rows P6 to P8 for every criterion that units may be ranked by besides activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from importance import test_criteria as criteria
from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError
from paretron.families import FAMILIES
from paretron.importance.collect import batches_of
from paretron.importance.criteria import CRITERIA, Material
from paretron.importance.criteria.fluctuation import fluctuation
from paretron.importance.executor import LayerStack
from paretron.importance.score import score_windows
from paretron.recipe import Score
from pico import pico_model


def test_p6_a_weight_that_no_gradient_reaches(pico: PicoMaker) -> None:
    criteria.test_a_gradient_that_reaches_nothing(pico)


def test_p6_a_fluctuation_that_is_seen_nowhere(pico: PicoMaker) -> None:
    checkpoint = Checkpoint.open(pico(num_hidden_layers=2))
    family = FAMILIES["llama"]
    reader = family.readers("ffn")[0]
    renamed = replace(reader, name=reader.name.replace("mlp", "feed_forward"))
    broken = replace(family, tensors=tuple(renamed if r is reader else r for r in family.tensors))
    stack = LayerStack(pico_model(num_hidden_layers=2), family)
    batches = list(batches_of([torch.arange(5)], 1))
    with pytest.raises(ParetronError) as caught:
        fluctuation(Material(replace(checkpoint, family=broken), stack, batches))
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_FAMILY
    assert "feed_forward" in problem.where


@pytest.mark.parametrize("name", CRITERIA)
def test_p7_values_do_not_depend_on_batches(pico: PicoMaker, name: str) -> None:
    criteria.test_batches_order_and_processes_do_not_matter(pico, "llama", name)


@pytest.mark.parametrize("windows", [[], [torch.arange(5), torch.arange(0)]], ids=len)
@pytest.mark.parametrize("name", CRITERIA)
def test_p8_no_tokens(pico: PicoMaker, name: str, windows: list[torch.Tensor]) -> None:
    score = Score.model_validate({"criterion": name})
    with pytest.raises(ParetronError) as caught:
        score_windows(Checkpoint.open(pico(num_hidden_layers=2)), windows, score=score)
    assert caught.value.exit_code == 3


def test_p8_one_token(pico: PicoMaker) -> None:
    """A gradient needs a token before another; one that fluctuates not at all is worth nothing."""
    criteria.test_samples_of_one_token_have_no_loss(pico)
    checkpoint = Checkpoint.open(pico(name="other", num_hidden_layers=2))
    score = Score(criterion="fluctuation")
    scores = score_windows(checkpoint, [torch.tensor([7])], score=score)
    for values in scores.units.values():
        assert torch.equal(values, torch.zeros_like(values))
