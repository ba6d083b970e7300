"""The evaluate section: held-out texts and tasks that every model is judged on."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from paretron.recipe.base import Name, Positive, Section
from paretron.recipe.tasks import SUITES, Task


class Evaluate(Section):
    """Held-out texts, by their name in `data`, and how they are read.

    `by`: "window", windows of the text's seq_len side by side; "sliding", windows that move by
    `stride` tokens (half of seq_len when left out), so that a token is scored once with at least
    seq_len - stride before it; "document", each document from its own start, by sliding windows
    where it is longer than seq_len.

    `tasks` are asked through lm-eval, and those of a `suite` that no task of the same name here
    takes the place of. `run_code` lets tasks run, on this machine and without a sandbox, the code
    that a model writes, and fetch the hub's metric that does it; without, a suite goes without
    those tasks, and says so, and naming one is an error.
    """

    perplexity: tuple[Literal["validation", "train", "calibration"], ...] = ("validation",)
    by: Literal["window", "sliding", "document"] = "window"
    stride: Positive | None = None
    micro_batch: Positive = 8
    tasks: tuple[Task, ...] = ()
    suite: Name | None = None
    run_code: bool = False

    def move(self, seq_len: int) -> int:
        """How many tokens a window of `seq_len` moves by."""
        return seq_len if self.by == "window" else self.stride or max(1, seq_len // 2)

    @property
    def asked(self) -> tuple[Task, ...]:
        """Every task: the suite's first, in its order."""
        own = {task.task for task in self.tasks}
        rest = (task for task in SUITES.get(str(self.suite), ()) if task.task not in own)
        return (*rest, *self.tasks)

    @property
    def without_tasks(self) -> Evaluate:
        """The texts alone."""
        return self.model_copy(update={"tasks": (), "suite": None, "run_code": False})

    @model_validator(mode="after")
    def _a_stride_is_used(self) -> Evaluate:
        if self.stride is not None and self.by == "window":
            raise ValueError("stride goes with by: sliding or by: document")
        return self

    @model_validator(mode="after")
    def _tasks_are_known_apart(self) -> Evaluate:
        if self.suite is not None and self.suite not in SUITES:
            raise ValueError(f"no suite {self.suite}: there is {', '.join(SUITES)}")
        names = [task.task for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the task {twice[0]} stands twice")
        return self
