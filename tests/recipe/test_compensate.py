"""What of compensation does not go together is said when the recipe is read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from paretron.recipe import Compensate, Recipe
from picorun import RECIPE


def test_an_axis_alone_is_compared_with_something() -> None:
    with pytest.raises(ValidationError, match="rotate and refit are both off"):
        Compensate(by_axis=True, rotate=False, refit=False)
    assert Compensate(by_axis=True, rotate=False, refit="mean").by_axis


def test_an_axis_alone_goes_by_one_scoring() -> None:
    sections = {"compensate": {"by_axis": True}, "score": {"rounds": 2}}
    with pytest.raises(ValidationError, match=r"score\.rounds must be 1"):
        Recipe.model_validate(RECIPE | sections)
    assert Recipe.model_validate(RECIPE | {"score": {"rounds": 2}}).score.rounds == 2
