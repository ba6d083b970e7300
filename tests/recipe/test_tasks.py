"""The tasks of a recipe: short and long forms, what contradicts itself, what paths are near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from paretron.recipe import Evaluate, Task, resolve_recipe


def test_a_name_alone_is_a_task() -> None:
    entries: dict[str, Any] = {"tasks": ["piqa", {"task": "mmlu", "few_shot": 5, "limit": 100}]}
    found = Evaluate.model_validate(entries)
    assert found.tasks == (Task(task="piqa"), Task(task="mmlu", few_shot=5, limit=100))
    assert found.asked == found.tasks
    assert Evaluate.model_validate(found.model_dump(mode="json")) == found
    assert not Evaluate().asked
    assert not Evaluate().run_code


@pytest.mark.parametrize(
    ("section", "cause"),
    [
        ({"tasks": ["piqa", {"task": "piqa", "few_shot": 1}]}, "stands twice"),
        ({"suite": "minitron"}, "there is minitron-base"),
        ({"tasks": [{"task": "piqa", "shots": 1}]}, "Extra inputs"),
        ({"tasks": [{"few_shot": 1}]}, "Field required"),
        ({"tasks": [{"task": "piqa", "limit": 0}]}, "greater than 0"),
        ({"tasks": [{"task": "piqa", "few_shot": -1}]}, "greater than or equal to 0"),
        ({"tasks": [{"task": "piqa", "sampling": {"temperature": 0}}]}, "greater than 0"),
        ({"tasks": [{"task": "piqa", "sampling": {"temperature": 1, "top_p": 2}}]}, "less than or"),
        ({"tasks": "piqa"}, "valid tuple"),
        ({"run_code": "please"}, "valid boolean"),
    ],
)
def test_tasks_that_contradict_themselves_are_refused(section: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        Evaluate.model_validate(section)


def test_a_tasks_file_is_the_recipes_neighbour(tmp_path: Path) -> None:
    text = {"path": "a.txt", "seq_len": 32}
    raw = {
        "schema": 1,
        "teacher": {"model": "./teacher"},
        "data": {"calibration": text, "train": text, "validation": text},
        "students": {"small": {"layers": 2}},
        "distill": {"tokens": 1280, "global_batch": 4},
        "evaluate": {"tasks": ["piqa", "tasks/mine.yaml", {"task": "../b.yml", "limit": 3}]},
    }
    found = resolve_recipe(raw, where="recipe.yaml", base=tmp_path).evaluate.tasks
    assert [task.task for task in found] == [
        "piqa", str(tmp_path / "tasks/mine.yaml"), str(tmp_path / "../b.yml"),
    ]  # fmt: skip
    assert found[2].limit == 3
