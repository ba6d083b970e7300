"""The evaluate section: how texts are read, and what of it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from paretron.errors import Code, ParetronError
from paretron.recipe import Evaluate, Recipe, resolve_recipe
from paretron.run.check import SEQ_LEN, twin_recipe
from pico import make_pico


def recipe(folder: Path, evaluate: dict[str, Any], *, seq_len: int = 128) -> Recipe:
    text = {"path": "a.txt", "seq_len": seq_len}
    raw = {
        "schema": 1,
        "teacher": {"model": str(folder)},
        "data": {"calibration": text, "train": text, "validation": text},
        "students": {"small": {"layers": 1}},
        "distill": {"tokens": 1e6},
        "evaluate": evaluate,
    }
    return resolve_recipe(raw, where="recipe.yaml", base=folder)


@pytest.mark.parametrize(
    ("evaluate", "move"),
    [
        ({}, 128),
        ({"by": "sliding"}, 64),
        ({"by": "sliding", "stride": 127}, 127),
        ({"by": "document", "stride": 1}, 1),
    ],
)
def test_how_far_windows_move(evaluate: dict[str, Any], move: int, tmp_path: Path) -> None:
    assert recipe(tmp_path, evaluate).evaluate.move(128) == move


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"by": "sliding", "stride": 128}, "at most 127"),
        ({"by": "document", "stride": 200}, "data.validation.seq_len"),
        ({"perplexity": ["validation", "train"], "by": "sliding", "stride": 300}, "at most 127"),
        ({"stride": 4}, "by: sliding or by: document"),
        ({"by": "token"}, "'window', 'sliding' or 'document'"),
        ({"by": "sliding", "stride": 0}, "greater than 0"),
        ({"by": "sliding", "stride": True}, "should be a number"),
    ],
)
def test_a_way_of_reading_that_is_none(evaluate: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        recipe(tmp_path, evaluate)
    assert {p.code for p in caught.value.problems} == {Code.RECIPE_VALUE}
    assert said in str(caught.value)


def test_windows_of_two_tokens_slide_by_one() -> None:
    assert Evaluate(by="sliding").move(2) == 1
    with pytest.raises(ValidationError):
        Evaluate(by="window", stride=1)


def test_a_rehearsal_slides_within_its_short_windows(tmp_path: Path) -> None:
    make_pico(tmp_path / "model")
    given = recipe(tmp_path / "model", {"by": "sliding", "stride": 1000}, seq_len=2048)
    twin = twin_recipe(given, folder=tmp_path, offline=True)
    assert (twin.evaluate.by, twin.evaluate.move(SEQ_LEN)) == ("sliding", SEQ_LEN // 2)
    assert twin_recipe(
        recipe(tmp_path / "model", {}), folder=tmp_path / "other", offline=True
    ).evaluate.stride is None  # fmt: skip
