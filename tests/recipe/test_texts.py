"""Sections of texts and phases: what may be stated together, and what paths are relative to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from paretron.recipe import Calibration, Distill, TrainingText, resolve_recipe

SOURCES = [{"path": "a.jsonl", "weight": 0.7}, {"dataset": "o/n", "weight": 0.3, "split": "x"}]
PHASES = [{"seq_len": 8, "tokens": 6.4e2}, {"seq_len": 32, "tokens": 1280, "lr": 1e-5}]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ({"path": "a", "dataset": "o/n"}, "exactly one of path, dataset, corpus and sources"),
        ({"path": "a", "sources": SOURCES, "tokens": 10}, "exactly one of"),
        ({}, "exactly one of"),
        ({"sources": SOURCES}, "sources go with tokens"),
        ({"sources": [{"path": "a"}], "tokens": 10}, "weight"),
        ({"sources": [{"path": "a", "weight": 0}], "tokens": 10}, "greater than 0"),
        ({"sources": [{"weight": 1}], "tokens": 10}, "exactly one of path, dataset and corpus"),
        ({"sources": SOURCES, "tokens": 10, "split": "x"}, "split goes with dataset"),
        ({"path": "a", "revision": "main"}, "revision goes with dataset"),
        ({"dataset": "not an id"}, "pattern"),
        ({"dataset": "../n"}, "pattern"),
        ({"path": "a", "documents": "mixed"}, "'joined' or 'apart'"),
    ],
)
def test_a_text_that_contradicts_itself_is_refused(text: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        TrainingText.model_validate(text)


def test_calibration_does_not_download_a_dataset_without_end() -> None:
    with pytest.raises(ValidationError, match="dataset goes with tokens"):
        Calibration.model_validate({"dataset": "o/n"})
    Calibration.model_validate({"dataset": "o/n", "tokens": 1e6})


def test_paths_of_sources_are_the_recipes_neighbours(tmp_path: Path) -> None:
    text = {"path": "a.txt"}
    raw = {
        "schema": 1,
        "teacher": {"model": str(tmp_path)},
        "data": {
            "calibration": text,
            "train": {"sources": SOURCES, "tokens": 100},
            "validation": text,
        },
        "students": {"small": {"layers": 1}},
        "distill": {"phases": PHASES},
    }
    recipe = resolve_recipe(raw, where="recipe.yaml", base=tmp_path)
    local, dataset = recipe.data.train.parts
    assert local.path == str(tmp_path / "a.jsonl")
    assert (dataset.path, dataset.dataset, dataset.column) == (None, "o/n", "text")
    assert recipe.distill.tokens == 1920
    again = resolve_recipe(recipe.model_dump(mode="json", by_alias=True), where="", base=tmp_path)
    assert again == recipe


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"tokens": 5}, "tokens 5 are not the 1920 of the phases"),
        ({"phases": [*PHASES, {"seq_len": 12, "tokens": 100}]}, "12 does not divide the longest"),
        ({"phases": [PHASES[0] | {"global_batch": 3, "micro_batch": 2}]}, "not a multiple"),
        ({"phases": [PHASES[0] | {"lr": 1e-6}]}, "min_lr 1e-05 is above lr 1e-06"),
        ({"phases": [{"seq_len": 8}]}, "phases.0.tokens"),
        ({"phases": [8]}, "phases.0"),
        ({"phases": "x"}, "phases"),
        ({"phases": [{"seq_len": 8, "tokens": "x"}]}, "phases.0.tokens"),
    ],
)
def test_phases_that_do_not_fit_are_refused(change: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        Distill.model_validate({"phases": PHASES, "global_batch": 4} | change)
