"""Which tasks of a recipe can be asked here: what planning tells of them, from names and files."""

from __future__ import annotations

from collections.abc import Collection

from paretron.data.taskfiles import asked_tasks, known_tasks, task_name
from paretron.errors import Code, Problem
from paretron.recipe import Recipe
from paretron.recipe.goals import parse_goals


def task_outlook(recipe: Recipe) -> tuple[list[Problem], list[str]]:
    """What keeps the recipe's tasks from being asked, and which of a suite are left out, and why.

    Whether a group holds a task that runs code is seen when it is loaded.
    """
    asked, left_out, problems = asked_tasks(recipe.evaluate)
    notices = [f"evaluate.suite: {name} is left out: {why}" for name, why in left_out.items()]
    if not problems:
        problems = _goals(recipe, {task_name(task) for task in asked} | left_out.keys())
    return problems, notices


def _goals(recipe: Recipe, names: Collection[str]) -> list[Problem]:
    """The goals for tasks that nobody asks; one of lm-eval's may be part of a group that is."""
    tasks = [goal for goal in parse_goals(recipe.goals) if goal.figure == "task"]
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"no task that is asked is called {goal.name}",
            where=f"goals.{goal.key}",
            fix=f"one of {', '.join(sorted(names))}",
        )
        for goal in tasks
        if goal.name not in names and goal.name not in known_tasks()
    ]
