"""What is scored and how: the aggregation of activations (paper 1), the ranking of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from paretron.recipe.base import Place, Positive, Section


class Depth(Section):
    """How layers are ranked: by loss or a task's accuracy when removed, or by what they change.

    `task` names a multiple-choice task of lm-eval, or a YAML file of one. `samples` are windows of
    text, or the task's documents.
    """

    metric: Literal["loss", "bi", "angular", "task"] = "loss"
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
    """Aggregation of activations over a sample's positions, then over samples (paper 1).

    `placement`: the whole model in memory, or one layer at a time; the scores are the same.
    `documents`: a window over several is one sample, or each of its documents is one of its own,
    which sees nothing of the others.
    """

    batch: Literal["mean", "l2", "var"] = "l2"
    sequence: Literal["mean", "l2", "var"] = "mean"
    micro_batch: Positive = 8
    documents: Literal["joined", "apart"] = "joined"
    placement: Literal["auto", "resident", "streamed"] = "auto"
    processes: Positive = 1
    depth: Depth = Depth()
