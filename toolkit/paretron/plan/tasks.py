"""Which tasks of a recipe can be asked here: what planning tells of them, from names and files."""

from __future__ import annotations

from paretron.data.taskfiles import asked_tasks
from paretron.errors import Problem
from paretron.recipe import Recipe


def task_outlook(recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """What keeps the recipe's tasks from being asked, and which of a suite are left out, and why.

    Whether a group holds a task that runs code is seen when it is loaded.
    """
    _, left_out, problems = asked_tasks(recipe.evaluate)
    notices = [f"evaluate.suite: {name} is left out: {why}" for name, why in left_out.items()]
    return problems, notices
