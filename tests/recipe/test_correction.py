"""What a recipe may say of a correction that goes along with distillation."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from paretron.recipe import Correct, Recipe
from picorun import RECIPE

ALONG = {"mode": "parallel", "tokens": 512, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 1}


def recipe(correct: dict[str, Any], **distill: Any) -> Recipe:
    changed = {"correct": correct, "distill": RECIPE["distill"] | distill}
    return Recipe.model_validate(RECIPE | changed)


def test_what_divides_the_work_is_that_of_the_distillation() -> None:
    found = recipe(ALONG, processes=2, checkpoint_every=7)
    correct, distill = found.parallel_correction, found.distill
    assert correct is not None
    assert found.serial_correction is None
    assert (correct.global_batch, correct.processes, correct.checkpoint_every) == (4, 2, 7)
    assert all(getattr(correct, n) == getattr(distill, n) for n in Correct.OF_DISTILL)
    assert correct.lr == 1e-3
    # What a run keeps of its recipe is a recipe again.
    assert Recipe.model_validate(found.model_dump(mode="json", by_alias=True)) == found


def test_a_serial_correction_is_as_it_was() -> None:
    found = Recipe.model_validate(RECIPE)
    assert found.parallel_correction is None
    assert found.serial_correction is found.correct
    assert found.correct is not None
    assert found.correct.micro_batch == 4 != found.distill.micro_batch


@pytest.mark.parametrize(
    ("stated", "distill", "said"),
    [
        ({"global_batch": 8}, {}, "correct.global_batch 8 is not the 4 of distill"),
        ({"dtype": "bfloat16"}, {}, "correct.dtype bfloat16 is not the float32"),
        ({"eval_every": 3}, {}, "correct.eval_every 3 is not the 2 of distill"),
        ({"tokens": 769}, {}, "769 are more than the 768 of distill"),
        ({"trial": {"tokens": 512}}, {}, "mode: serial"),
        ({}, {"offline": "hidden"}, "not with distill.offline"),
        ({}, {"loss": {"logits": "none", "labels": 1.0}}, "never asks"),
        ({}, {"processes": 2, "tensor_parallel": 2}, "not tried with distill.tensor_parallel"),
        ({}, {"teacher": "offloaded"}, "not with distill.teacher: offloaded"),
    ],
)
def test_what_cannot_go_together_is_refused(
    stated: dict[str, Any], distill: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(ALONG | stated, **distill)
