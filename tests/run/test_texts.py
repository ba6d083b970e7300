"""What a stage reads from outside of the run is part of what it is known by."""

from __future__ import annotations

from pathlib import Path

from paretron.plan.stages import Stage
from paretron.recipe import Recipe
from paretron.run.texts import content_identity
from paretron.run.workspace import Workspace

SCORE = Stage("score", "score", {}, {})


def recipe(depth: dict[str, str]) -> Recipe:
    text = {"path": "text.txt"}
    return Recipe.model_validate(
        {
            "schema": 1,
            "teacher": {"model": "./teacher"},
            "data": {"calibration": text, "train": text, "validation": text},
            "students": {"short": {"layers": 2}},
            "distill": {"tokens": 1e6},
            "score": {"depth": depth},
        }
    )


def test_an_edited_task_is_another_task(tmp_path: Path) -> None:
    task = tmp_path / "own.yaml"
    workspace = Workspace(tmp_path / "run")
    wanted = recipe({"metric": "task", "task": str(task)})
    seen = []
    for text in ("task: a\n", "task: b\n", "task: a\n"):
        task.write_text(text)
        seen.append(content_identity(SCORE, wanted, workspace))
    assert seen[0] == seen[2] != seen[1]
    assert None not in seen
    named = recipe({"metric": "task", "task": "winogrande"})
    assert content_identity(SCORE, named, workspace) is None
    assert content_identity(SCORE, recipe({"metric": "loss"}), workspace) is None
