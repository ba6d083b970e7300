"""How many of a task's questions a model answers well, one task after the other, each kept.

A task's figure is written down as soon as it is there, with every document's own: a killed
evaluation asks the rest. Intervals are of 95 %: Wilson's (1927) for a share of documents, which
stays within 0 and 1 and is right for few of them; else the figure and 1.96 standard errors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.artifacts.journal import Journal, Key
from paretron.artifacts.manifest import versions
from paretron.data.answers import SEED, Asker, Judged
from paretron.data.taskfiles import asked_tasks, lm_eval_version, task_sha256
from paretron.errors import raise_all
from paretron.evaluate.asking import OnEvent
from paretron.evaluate.intervals import Z
from paretron.recipe import Evaluate, Task

if TYPE_CHECKING:
    from paretron.data.harness import LoadedTask

SAMPLES = "samples"  # the folder of documents' scores: TASK.jsonl, {"doc", "score"} a line


@dataclass(frozen=True)
class TaskScore:
    """A model's figure in one task, as evaluation.json holds it.

    `low` and `high` are the ends of its 95 % interval, None where nothing is known of the spread;
    `samples` counts the documents.
    """

    metric: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    samples: int
    few_shot: int
    higher_is_better: bool


@dataclass(frozen=True)
class TaskScores:
    """What a model reached in every task, what was left out and why, and the documents' scores."""

    scores: Mapping[str, TaskScore]
    left_out: Mapping[str, str]
    samples: Mapping[str, tuple[float, ...]]

    def write_samples(self, folder: Path) -> None:
        """One file a task, in the order of its documents, the same for every model."""
        for name, scores in self.samples.items():
            if not scores:  # of a metric that is no mean over documents
                continue
            path = folder / SAMPLES / f"{file_name(name)}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps({"doc": k, "score": s}) for k, s in enumerate(scores)]
            path.write_text("\n".join(lines) + "\n", "utf-8")


def measure_tasks(
    asker: Asker,
    evaluate: Evaluate,
    *,
    model: str,
    state: Path | None,
    offline: bool = False,
    on_event: OnEvent,
) -> TaskScores:
    """Ask a model every task of the recipe; with a `state` folder, only those not done before.

    `model` is what the model is known by from others. Events: "task" with name, metric and value,
    and whether it was reused. Errors: those of `asked_tasks`, `load_tasks` and `judge`.
    """
    tasks, left_out, problems = asked_tasks(evaluate)
    raise_all(problems)
    journal = None
    if state is not None and tasks:
        journal = Journal(state / "tasks.jsonl", of=_depends_on(model), start_over=True)
    for name, reason in left_out.items():
        on_event("note", {"message": f"the task {name} is left out: {reason}"})
    asked = _Asked(asker, evaluate.run_code, offline, journal, on_event)
    found: dict[str, Judged] = {}
    for task in tasks:
        found |= dict(asked.results(task))
    return TaskScores(
        {name: task_score(judged) for name, judged in found.items()},
        left_out,
        {name: judged.scores for name, judged in found.items()},
    )


def _depends_on(model: str) -> dict[str, Any]:
    """What every task's figure depends on, besides the task itself."""
    found = versions()
    kept = {name: found.get(name) for name in ("paretron", "torch", "transformers")}
    return {
        "model": model,
        "seed": SEED,
        "versions": kept | {"lm-eval": lm_eval_version()},
    }


@dataclass(frozen=True)
class _Asked:
    """Asks tasks, or finds them in the journal of an evaluation that was stopped."""

    asker: Asker
    run_code: bool
    offline: bool
    journal: Journal | None
    on_event: OnEvent

    def results(self, task: Task) -> Iterator[tuple[str, Judged]]:
        """The figures that a task stands for: one, or those of a tag's or a loose group's tasks."""
        from paretron.data.harness import load_tasks  # lm-eval takes seconds: when it is needed

        identity = task_identity(task)
        if (whole := self._known(("whole", identity))) is not None:
            for name in whole["names"]:
                yield name, self._reused(("task", name, identity))
            return
        where = f"evaluate.tasks: {task.task}"
        loaded = load_tasks(task.task, where=where, run_code=self.run_code, offline=self.offline)
        for one in loaded:
            key = ("task", one.name, identity)
            if self._known(key) is not None:
                yield one.name, self._reused(key)
                continue
            parts = [self._part(one, name, task, identity) for name in one.leaves]
            judged = pooled(parts)
            self._keep(key, judged)
            yield one.name, judged
        if self.journal is not None:
            self.journal.add(("whole", identity), {"names": [one.name for one in loaded]})

    def _part(self, whole: LoadedTask, name: str, task: Task, identity: str) -> Judged:
        """One task of lm-eval, which may be one of many that are a figure together."""
        from paretron.data.harness import judge

        key = ("part", name, identity)
        if self._known(key) is not None:
            return self._reused(key)
        where = f"evaluate.tasks: {name}"
        judged = judge(
            name, whole.leaves[name], self.asker, asked=task, where=where, group_metric=whole.metric
        )
        if len(whole.leaves) > 1:
            self._keep(key, judged)
        return judged

    def _known(self, key: Key) -> Mapping[str, Any] | None:
        return self.journal.known.get(key) if self.journal is not None else None

    def _reused(self, key: Key) -> Judged:
        known = self._known(key) or {}
        judged = Judged(**{**known, "scores": tuple(known["scores"])})
        self._tell(str(key[1]), judged, reused=True)
        return judged

    def _keep(self, key: Key, judged: Judged) -> None:
        if self.journal is not None:
            self.journal.add(key, asdict(judged))
        self._tell(str(key[1]), judged, reused=False)

    def _tell(self, name: str, judged: Judged, *, reused: bool) -> None:
        fields = {"task": name, "metric": judged.metric, "value": judged.value, "reused": reused}
        self.on_event("task", fields)


def task_identity(task: Task) -> str:
    """A hash over how a task is asked and, where it is a file, over what it says and reads."""
    asked: dict[str, Any] = task.model_dump(mode="json")
    if task.file is not None:  # wherever it lies
        asked["task"] = task_sha256(task.file)
    said = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def pooled(parts: Sequence[Judged]) -> Judged:
    """The figure of several tasks' documents together, each document counting alike.

    The standard error is that of the pooled documents, lm-eval's way: variances within the tasks.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(p.samples for p in parts)
    errors = [p.stderr for p in parts]
    # (size - 1) stderr^2 size is a task's sum of squares about its own mean.
    squares = [(p.samples - 1) * p.stderr**2 * p.samples for p in parts if p.stderr is not None]
    freedom = total - len(parts)
    return Judged(
        metric=parts[0].metric,
        value=sum(p.value * p.samples for p in parts) / total,
        stderr=None if None in errors or freedom < 1 else math.sqrt(sum(squares) / freedom / total),
        scores=tuple(s for p in parts for s in p.scores) if all(p.scores for p in parts) else (),
        samples=total,
        few_shot=parts[0].few_shot,
        higher_is_better=parts[0].higher_is_better,
    )


def task_score(judged: Judged) -> TaskScore:
    """A figure with its interval."""
    low: float | None
    high: float | None
    if judged.scores and set(judged.scores) <= {0.0, 1.0}:
        low, high = wilson(sum(judged.scores), len(judged.scores))
    elif judged.stderr is not None:
        low, high = judged.value - Z * judged.stderr, judged.value + Z * judged.stderr
    else:
        low = high = None
    return TaskScore(
        metric=judged.metric,
        value=judged.value,
        stderr=judged.stderr,
        low=low,
        high=high,
        samples=judged.samples,
        few_shot=judged.few_shot,
        higher_is_better=judged.higher_is_better,
    )


def wilson(right: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, `right` of `total`.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    """
    share, square = right / total, Z**2 / total
    middle = (share + square / 2) / (1 + square)
    reach = Z * math.sqrt((share * (1 - share) + square / 4) / total) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def file_name(task: str) -> str:
    """A task's name as a file may have it."""
    return re.sub(r"[^\w.+-]", "_", task)
