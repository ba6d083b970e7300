"""Which of the recipe's goals each student reached, each judged by an interval.

A goal is met or missed where the whole interval lies on one side of its bound, undecided where the
bound lies inside or where nothing is known of the spread, and absent where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.recipe.goals import SIZES, SPEEDS, Goal, parse_goals
from paretron_profiling.figures import plain
from paretron_profiling.goals_speed import Found, NotMeasuredError, speed_of
from paretron_profiling.models import TEACHER
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import jsonable

MET, MISSED, UNDECIDED, ABSENT = "met", "missed", "undecided", "absent"

# What lm-eval measures that does not lie between 0 and 1.
_NO_SHARE = frozenset(
    {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "bleu", "chrf", "ter"}
)

Models = Sequence[Mapping[str, Any]]
Evaluations = Mapping[str, Mapping[str, Any]]
Differences = Mapping[str, Mapping[str, Mapping[str, float | None]]]


def judged(
    goals: Mapping[str, str],
    *,
    models: Models,
    profile: Mapping[str, Any],
    evaluations: Evaluations,
    differences: Differences,
) -> list[dict[str, Any]]:
    """A verdict for every student and goal, as a report holds it.

    `models` are a report's, `profile` the content of profile.json ({}: there is none),
    `evaluations` that of each model's evaluation.json; `differences` holds, by model and
    "loss.TEXT" or "task.NAME", the {value, low, high} of student minus teacher taken in pairs.
    Value, interval and bound share one unit; tasks are in percent.
    """
    measured = ProfileResult.from_json(profile) if profile else None
    judge = _Judge({m["name"]: m for m in models}, measured, evaluations, differences)
    return [
        jsonable(judge.verdict(goal, model["name"]))
        for model in models
        if model["kind"] != TEACHER
        for goal in parse_goals(goals)
    ]


def said(verdict: Mapping[str, Any]) -> str:
    """A verdict in a line: "width: params at most 0.5 times the teacher's: met, 0.48"."""
    goal, _, about = verdict["text"].partition("; ")
    text = f"{verdict['model']}: {verdict['figure']} {goal}: {verdict['verdict']}"
    if verdict["value"] is None:
        return f"{text}, {about}"
    number, low, high = (_shown(verdict[k]) for k in ("value", "low", "high"))
    if verdict["low"] is None or verdict["high"] is None:
        return f"{text}, {number} of unknown spread"
    if verdict["low"] == verdict["high"]:
        return f"{text}, {number}"
    return f"{text}, {number} ({low} to {high})"


def _shown(value: float | None) -> str:
    return plain(value, digits=4)


def require_some(goals: Sized, *, where: str) -> None:
    """USAGE when no goal is stated."""
    if not goals:
        raise ParetronError(
            Problem(
                Code.USAGE,
                "there is no goal to require",
                where=where,
                fix="state some under `goals` in the recipe, or leave out --require-goals",
            )
        )


def require(verdicts: Sequence[Mapping[str, Any]], *, where: str) -> None:
    """GATE_GOALS with a problem for every goal that is not met; USAGE when there is no goal."""
    require_some(verdicts, where=where)
    raise_all(
        [
            Problem(Code.GATE_GOALS, said(verdict), where=where, fix=_FIX[verdict["verdict"]])
            for verdict in verdicts
            if verdict["verdict"] != MET
        ]
    )


_FIX = {
    MISSED: "take another student or another goal; the report says what each one costs",
    UNDECIDED: "the interval holds the bound: measure longer (profile.repeats, more of the text)",
    ABSENT: "have it measured: `profile` and `evaluate` say what is",
}


class _Judge:
    """Everything that was measured, asked for one goal and model at a time."""

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Any]],
        profile: ProfileResult | None,
        evaluations: Evaluations,
        differences: Differences,
    ) -> None:
        self._models, self._profile = models, profile
        self._evaluations, self._differences = evaluations, differences

    def verdict(self, goal: Goal, model: str) -> dict[str, Any]:
        found: Found | None = None
        try:
            found = self._found(goal, model)
            about = found.about
        except NotMeasuredError as absence:
            about = f"not measured: {absence}"
        return {
            "model": model,
            "figure": goal.key,
            "text": "; ".join(part for part in (_sentence(goal), about) if part),
            "bound": goal.bound,
            "value": found.value if found else None,
            "low": found.low if found else None,
            "high": found.high if found else None,
            "verdict": ABSENT if found is None else _decided(goal, found),
        }

    def _found(self, goal: Goal, model: str) -> Found:
        if goal.figure in SPEEDS:
            if self._profile is None:
                raise NotMeasuredError("the run has no profile")
            return speed_of(goal, model=model, profile=self._profile)
        if goal.figure in SIZES:
            return self._size(goal, model)
        if goal.kind == "absolute":
            value, low, high = self._quality(goal, model)
            return Found(value, low, high, "")
        return self._compared(goal, model)

    def _size(self, goal: Goal, model: str) -> Found:
        """Counted, so that the interval is a point."""
        own, base = self._models[model].get(goal.figure), self._size_of_teacher(goal)
        if own is None:
            raise NotMeasuredError("it is not known")
        if goal.kind == "absolute":
            return Found(own, own, own, "")
        if not base:
            raise NotMeasuredError("the teacher's is not known")
        value = own / base if goal.kind == "ratio" else own - base
        return Found(value, value, value, "")

    def _size_of_teacher(self, goal: Goal) -> float | None:
        teachers = [m for m in self._models.values() if m["kind"] == TEACHER]
        return teachers[0].get(goal.figure) if teachers else None

    def _compared(self, goal: Goal, model: str) -> Found:
        """Against the teacher: by windows or documents in pairs, or else by the two intervals."""
        base = "loss" if goal.figure == "perplexity" else goal.figure
        alone = replace(goal, figure=base)
        own = self._quality(alone, model)
        paired = self._differences.get(model, {}).get(f"{base}.{goal.name}")
        scale = 100.0 if goal.figure == "task" else 1.0
        if paired is not None:
            value, low, high = (_scaled(paired.get(k), scale) for k in ("value", "low", "high"))
            about = "taken in pairs"
        else:
            teacher = self._quality(alone, TEACHER)
            value = own[0] - teacher[0]
            low, high = _apart(own[1], teacher[2]), _apart(own[2], teacher[1])
            about = "not taken in pairs: both intervals count, which is more than is needed"
        if goal.figure == "perplexity":  # their ratio is exp of the losses' difference
            value, low, high = _exp(value), _exp(low), _exp(high)
        if value is None:
            raise NotMeasuredError("the difference is not a number")
        return Found(value, low, high, about)

    def _quality(self, goal: Goal, model: str) -> tuple[float, float | None, float | None]:
        """A loss, a perplexity or a task's result in percent, with its interval."""
        part = "tasks" if goal.figure == "task" else "texts"
        entry = self._evaluations.get(model, {}).get(part, {}).get(goal.name)
        if entry is None:
            raise NotMeasuredError(f"{model} was not judged on {goal.name}")
        if goal.figure == "task":
            if (metric := entry.get("metric")) in _NO_SHARE:
                raise NotMeasuredError(f"{metric} is no share that could be stated in percent")
            value, low, high = (_scaled(entry.get(k), 100.0) for k in ("value", "low", "high"))
        else:
            value, low, high = (_scaled(entry.get(k), 1.0) for k in ("loss", "low", "high"))
            if goal.figure == "perplexity":
                value, low, high = _exp(value), _exp(low), _exp(high)
        if value is None:
            raise NotMeasuredError(f"{model}'s result on {goal.name} is not a number")
        return value, low, high


def _decided(goal: Goal, found: Found) -> str:
    if found.low is None or found.high is None:
        return UNDECIDED
    low, high = found.low, found.high
    if goal.at_least:
        return MET if low >= goal.bound else MISSED if high < goal.bound else UNDECIDED
    return MET if high <= goal.bound else MISSED if low > goal.bound else UNDECIDED


def _sentence(goal: Goal) -> str:
    """A goal in words: "at least 1.8 times the teacher's"."""
    bound = "at least" if goal.at_least else "at most"
    number = f"{abs(goal.bound):,.15g}"
    if goal.kind == "ratio":
        return f"{bound} {number} times the teacher's"
    if goal.kind == "difference":
        side = "below" if goal.text.lstrip("<>= ").startswith("-") else "above"
        return f"{bound} {_unit(number, goal, 'points')} {side} the teacher's"
    return f"{bound} {_unit(number, goal, '%')}"


def _unit(number: str, goal: Goal, of_a_task: str) -> str:
    units = {"loss": "nats a token", "task": of_a_task}
    return f"{number} {units[goal.figure]}" if goal.figure in units else number


def _scaled(value: float | None, scale: float) -> float | None:
    """A finite number, or nothing."""
    return scale * value if value is not None and math.isfinite(value) else None


def _apart(one: float | None, other: float | None) -> float | None:
    return one - other if one is not None and other is not None else None


def _exp(value: float | None) -> float | None:
    """None also where no float can hold it: such a loss says that the model is lost."""
    return math.exp(value) if value is not None and value < 700 else None
