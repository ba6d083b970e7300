"""What is scored and how: by activations (paper 1) or another criterion, and layers by what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from paretron.recipe.base import NUMBER, Place, Positive, Section


class Depth(Section):
    """How layers are ranked: by loss or a task's accuracy when removed, by what they change, or by
    their weights.

    Not `contiguous`, they go one by one: Shortened LLaMA is `loss` so, ShortGPT is `bi` so.
    `random` draws by the recipe's seed; `magnitude` and `taylor` are sums over a layer's weights.
    `task` names a multiple-choice task of lm-eval, or a YAML file of one. `samples` are windows of
    text, or the task's documents.
    """

    metric: Literal["loss", "bi", "angular", "task", "random", "magnitude", "taylor"] = "loss"
    task: Place | None = None
    contiguous: bool = True
    samples: Positive = 32

    @model_validator(mode="after")
    def _task_goes_with_its_metric(self) -> Depth:
        if (self.task is not None) != (self.metric == "task"):
            raise ValueError("metric: task needs a task, and a task needs metric: task")
        return self

    @property
    def task_file(self) -> Path | None:
        """The file of a task of one's own; None for a task that lm-eval knows by name."""
        own = self.task is not None and self.task.endswith((".yaml", ".yml"))
        return Path(str(self.task)) if own else None


class Score(Section):
    """What the units of an axis are ranked by, and how activations are aggregated.

    `criterion`: `activation` aggregates over a sample's positions, then over samples (paper 1);
    `random` draws by the recipe's seed; `magnitude` is the norm of a unit's weights; `taylor` their
    first-order effect on the loss (LLM-Pruner), which needs gradients; `fluctuation` the variance
    of what is read times the weights that read it (FLAP).
    `rounds`: a student is cut in so many equal steps, scored anew before each (paper 1's iterative
    importance).
    `placement`: the whole model in memory, or one layer at a time; the scores are the same.
    `documents`: a window over several is one sample, or each of its documents is one of its own,
    which sees nothing of the others.
    """

    criterion: Literal["activation", "random", "magnitude", "taylor", "fluctuation"] = "activation"
    batch: Literal["mean", "l2", "var"] = "l2"
    sequence: Literal["mean", "l2", "var"] = "mean"
    rounds: Annotated[int, NUMBER, Field(ge=1, le=100)] = 1
    micro_batch: Positive = 8
    documents: Literal["joined", "apart"] = "joined"
    placement: Literal["auto", "resident", "streamed"] = "auto"
    processes: Positive = 1
    depth: Depth = Depth()

    @model_validator(mode="after")
    def _gradients_need_the_model(self) -> Score:
        if self.needs_gradients(depth=True) and self.placement == "streamed":
            raise ValueError(
                "taylor needs gradients, so the whole model in memory: placement resident or auto, "
                "or another criterion and depth.metric"
            )
        return self

    def after(self, done: int, *, have: int, want: int) -> int:
        """The size of an axis when so many of the rounds are done, rounded to a whole one."""
        return have - (2 * done * (have - want) + self.rounds) // (2 * self.rounds)

    def needs_gradients(self, *, depth: bool) -> bool:
        """Whether a backward pass is part of scoring, with or without ranking layers."""
        return self.criterion == "taylor" or (depth and self.depth.metric == "taylor")
