"""The goals section: what every student is to reach, a bound for each figure.

    goals:
      output_tok_s: ">= 1.8x"
      output_tok_s@same_memory: ">= 2.5x"
      ttft_ms@vllm_server/concurrency:16/128x128: "<= 200"
      loss.validation: "<= +0.05"
      task.mmlu: ">= -3"
      params: "<= 0.6x"

A bound is absolute (`200`), a ratio to the measured teacher (`1.8x`), or, with a sign, a difference
from it (`+0.05`). Losses are in nats a token, tasks in percent and their differences in points.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from paretron.recipe.evaluating import Evaluate
from paretron.recipe.profiling import Profile

Kind = Literal["absolute", "ratio", "difference"]

SPEEDS = (
    "output_tok_s", "request_s", "prefill_tok_s", "decode_tok_s", "ttft_ms", "tpot_ms", "itl_ms",
    "e2e_ms", "power_w", "energy_j_tok",
)  # fmt: skip
SIZES = ("params", "non_embedding_params", "weight_bytes", "kv_bytes_per_token")
TEXTS = ("validation", "train", "calibration")
ALLOWED = (
    f"allowed: {', '.join(SPEEDS)} (with @ENGINE/LOAD/LENGTHS where it is not the headline's), "
    f"{', '.join(SIZES)}, loss.TEXT, perplexity.TEXT, task.NAME"
)
SAME_MEMORY = "same_memory"
# The first word of a load -> the field of `profile` that holds such loads.
LOADS = {"batch": "batches", "concurrency": "concurrency", "rate": "rates"}

_NUMBER = r"\d{1,30}(?:\.\d{0,30})?(?:[eE][+-]?\d{1,2})?"
_GOAL = re.compile(rf"(>=|<=) *([+-]?)({_NUMBER})(x?)")
_QUALITY = re.compile(r"(loss|perplexity|task)\.([A-Za-z0-9][A-Za-z0-9_.-]{0,99})")
_LOAD = re.compile(rf"({'|'.join(LOADS)}):({_NUMBER})")
_LENGTHS = re.compile(r"(\d{1,9})x(\d{1,9})")
_ENGINE = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
# What a bound of another kind would have to be judged by is not measured in pairs.
_OTHERWISE: Mapping[tuple[str, Kind], str] = {
    ("loss", "ratio"): "losses are compared by their difference: '<= +0.05' nats a token",
    ("perplexity", "difference"): "perplexities are compared by their ratio: '<= 1.05x'",
    ("task", "ratio"): "tasks are compared by their difference: '>= -3' points of a percent",
}


@dataclass(frozen=True)
class Place:
    """The workload that a speed is of; what is None is the headline's."""

    engine: str | None = None
    load: tuple[str, float] | None = None  # ("batch", 8.0), ("concurrency", 16.0), ("rate", 0.5)
    same_memory: bool = False
    lengths: tuple[int, int] | None = None


@dataclass(frozen=True)
class Goal:
    """One figure (`key`, as the recipe spells it) and its bound.

    `at_least` is the direction. `name` is the text or the task of a quality.
    """

    key: str
    figure: str
    name: str
    place: Place
    at_least: bool
    bound: float
    kind: Kind
    text: str


def parse_goals(goals: Mapping[str, str]) -> tuple[Goal, ...]:
    """Every goal; ValueError with what is wrong with each that is none."""
    found, wrong = [], []
    for key, text in goals.items():
        try:
            found.append(_parse(key, text))
        except ValueError as error:
            wrong.append(f"{key[:80]}: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return tuple(found)


def unmeasured(
    goals: Mapping[str, str], *, profile: Profile | None, evaluate: Evaluate
) -> Iterator[str]:
    """The goals that the recipe asks for and measures nothing of, each with the reason."""
    for goal in parse_goals(goals):
        if goal.figure in ("loss", "perplexity") and goal.name not in evaluate.perplexity:
            yield f"{goal.key}: evaluate.perplexity does not name {goal.name}"
        if goal.figure == "task" and not evaluate.asked:
            yield f"{goal.key}: evaluate names no tasks and no suite"
        if goal.figure not in SPEEDS:
            continue
        if profile is None:
            yield f"{goal.key}: without a `profile` section no speed is measured"
        elif reason := _not_profiled(goal.place, profile):
            yield f"{goal.key}: {reason}"


def _not_profiled(place: Place, profile: Profile) -> str:
    engines = [engine.name for engine in profile.engines]
    if place.engine is not None and place.engine not in engines:
        return f"profile.engines has no {place.engine}: {', '.join(engines)}"
    if place.load is not None:
        word, load = place.load
        field = LOADS[word]
        if load not in getattr(profile, field):
            return f"profile.{field} has no {load:g}"
    if place.same_memory and not profile.batches:
        return "profile.batches is empty: there is no memory to match"
    if place.lengths is not None and place.lengths not in profile.lengths:
        return f"profile.lengths has no {list(place.lengths)}"
    return ""


def _parse(key: str, text: str) -> Goal:
    figure, name, place = _figure(key)
    match = _GOAL.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text[:80]!r} is no bound: '<= 200' (absolute), '>= 1.8x' (times the teacher's), "
            "'>= -3' (the difference from it)"
        )
    direction, sign, number, times = match.groups()
    if sign and times:
        raise ValueError(f"{text[:80]!r} is a ratio and a difference: leave out {sign} or x")
    kind: Kind = "ratio" if times else "difference" if sign else "absolute"
    bound = float(sign + number)
    if kind == "ratio" and not bound:
        raise ValueError("0x holds of nothing or of everything: state a ratio above 0")
    if allowed := _OTHERWISE.get((figure, kind)):
        raise ValueError(allowed)
    if figure == "task" and kind == "absolute" and 0 < bound <= 1:
        raise ValueError(f"tasks are in percent: {100 * bound:g}, not {number}")
    return Goal(key, figure, name, place, direction == ">=", bound, kind, text.strip())


def _figure(key: str) -> tuple[str, str, Place]:
    """A goal's key as its figure, the text or task, and the workload."""
    figure, at, place = key.partition("@")
    if figure in SPEEDS:
        if at and not place:
            raise ValueError("nothing stands after @")
        return figure, "", _place(place) if at else Place()
    quality = _QUALITY.fullmatch(figure)
    if at or not (figure in SIZES or quality):
        raise ValueError(f"no figure that a goal can be stated for; {ALLOWED}")
    if quality is None:
        return figure, "", Place()
    kind, name = quality.groups()
    if kind != "task" and name not in TEXTS:
        raise ValueError(f"no text of a recipe is called {name}: {', '.join(TEXTS)}")
    return kind, name, Place()


def _place(text: str) -> Place:
    """`ENGINE/LOAD/LENGTHS`, each of which may be left out."""
    parts = text.split("/")
    engine = load = lengths = None
    if _ENGINE.fullmatch(parts[0]) and not (
        parts[0] == SAME_MEMORY or _LENGTHS.fullmatch(parts[0])
    ):
        engine = parts.pop(0)
    same_memory = bool(parts) and parts[0] == SAME_MEMORY
    if same_memory:
        parts.pop(0)
    elif parts and (found := _LOAD.fullmatch(parts[0])):
        load = (found[1], float(found[2]))
        parts.pop(0)
    if parts and (found := _LENGTHS.fullmatch(parts[0])):
        lengths = (int(found[1]), int(found[2]))
        parts.pop(0)
    if parts:
        raise ValueError(
            f"{'/'.join(parts)[:80]!r} is no part of a workload: @ENGINE, then batch:8, "
            f"concurrency:16, rate:0.5 or {SAME_MEMORY}, then 128x128, in this order with / "
            "between them"
        )
    return Place(engine, load, same_memory, lengths)


def _dotted(value: Any) -> Any:
    """{task: {mmlu: X}} as {task.mmlu: X}: how --set writes it, and how some will."""
    return dict(_leaves(value)) if isinstance(value, dict) else value


def _leaves(section: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for name, value in section.items():
        key = f"{path}.{name}" if path else str(name)
        pairs = _leaves(value, key) if isinstance(value, dict) else [(key, _bound(key, value))]
        for found, bound in pairs:
            if found in seen:
                raise ValueError(f"{found[:80]} stands twice")
            seen.add(found)
            yield found, bound


def _bound(key: str, value: Any) -> Any:
    if isinstance(value, bool | int | float):
        raise ValueError(
            f"{key[:80]}: {value} is no bound: '<= {value}' or '>= {value}', in quotes"
        )
    return value


def _whole(goals: dict[str, str]) -> dict[str, str]:
    parse_goals(goals)
    return goals


Goals = Annotated[dict[str, str], BeforeValidator(_dotted), AfterValidator(_whole)]
