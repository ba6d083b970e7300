"""Tasks that a model is asked, and the suites of the papers: which of them, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from paretron.recipe.base import NUMBER, Count, Place, Positive, Section

TASK_SUFFIXES = (".yaml", ".yml")


class Sampling(Section):
    """How answers are drawn instead of decoded greedily: `samples` of them for each question."""

    temperature: Annotated[float, NUMBER, Field(gt=0, le=10)]
    top_p: Annotated[float, NUMBER, Field(gt=0, le=1)] = 1.0
    samples: Positive = 1


class Task(Section):
    """A task or group of lm-eval by its name, or a YAML file of one task.

    `few_shot` answered examples stand before each question, as many as the task says when left
    out; `limit` asks the first documents alone. `metric` is one of the task's, `acc_norm` or
    `exact_match,strict-match` with the filter's name; left out, its first. `sampling` is for tasks
    that generate. A name alone stands for `{task: NAME}`.
    """

    task: Place
    few_shot: Count | None = None
    limit: Positive | None = None
    metric: Place | None = None
    sampling: Sampling | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @property
    def file(self) -> Path | None:
        """The file of a task of one's own; None for what lm-eval knows by name."""
        return task_file(self.task)


def task_file(task: str) -> Path | None:
    """The path that a task is named by, or None when it is a name."""
    return Path(task) if task.endswith(TASK_SUFFIXES) else None


_ONE, _TWENTY = (Sampling(temperature=0.2, top_p=0.95, samples=n) for n in (1, 20))

# Paper 1, section 4 and tables 2 and 3. XL-Sum is of 20 % of the English test split's 11,535
# articles; its text says 0-shot, its tables 3.
SUITES: Mapping[str, tuple[Task, ...]] = {
    "minitron-base": (
        Task(task="mmlu", few_shot=5, metric="acc"),
        Task(task="winogrande", few_shot=5, metric="acc"),
        Task(task="arc_challenge", few_shot=25, metric="acc_norm"),
        Task(task="hellaswag", few_shot=10, metric="acc_norm"),
        Task(task="truthfulqa_mc2", few_shot=0, metric="acc"),
        Task(task="gsm8k", few_shot=5, metric="exact_match,strict-match"),
        Task(task="xlsum_english", few_shot=3, limit=2307),
        Task(task="humaneval", few_shot=0, metric="pass@1", sampling=_TWENTY),
        Task(task="mbpp", few_shot=0, metric="pass_at_1", sampling=_ONE),
    ),
}
