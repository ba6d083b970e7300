"""What a goal of speed is judged by: the workload that it speaks of, and the interval there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paretron.recipe.goals import Goal, Place
from paretron_profiling.compare import SAME_MEMORY
from paretron_profiling.models import TEACHER
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import CLOSED, FIGURES, FLAGS, MODES, OFFLINE, OPEN, Measurement
from paretron_profiling.stats import median_interval

_MODE = {"batch": OFFLINE, "concurrency": CLOSED, "rate": OPEN}


class NotMeasuredError(Exception):
    """Why there is nothing to judge a goal by."""


@dataclass(frozen=True)
class Found:
    """A figure in the unit of a goal's bound, its interval (None: unknown), and what it is of."""

    value: float
    low: float | None
    high: float | None
    about: str


def speed_of(goal: Goal, *, model: str, profile: ProfileResult) -> Found:
    """A student's speed, or its ratio to or difference from the teacher's; NotMeasuredError.

    Samples of the two pair by position: they were taken in the same rounds. A ratio of output
    tokens/s is the speedup that a report's headline states.
    """
    base, own = _measured_at(goal.place, model, profile)
    figure = FIGURES[goal.figure]
    if goal.kind == "absolute":
        values = [figure(sample, own.workload) for sample in own.samples]
        return _found(values, about=_about(own, base if goal.place.same_memory else None))
    if base is None:
        raise NotMeasuredError("the teacher was not measured there")
    about = _about(own, base)
    pairs = [
        (figure(a, own.workload), figure(b, base.workload))
        for a, b in zip(own.samples, base.samples, strict=False)
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if goal.kind == "ratio":
        return _found([a / b if b else None for a, b in both], about=about)
    return _found([a - b for a, b in both], about=about)


def _found(values: Sequence[float | None], *, about: str) -> Found:
    numbers = [v for v in values if v is not None and math.isfinite(v)]
    if not numbers:
        raise NotMeasuredError(f"no sample has this figure ({about})")
    interval = median_interval(numbers)
    known = len(numbers) > 1
    return Found(
        interval.median,
        interval.low if known else None,
        interval.high if known else None,
        about + _said(len(numbers), interval.coverage),
    )


def _measured_at(
    place: Place, model: str, profile: ProfileResult
) -> tuple[Measurement | None, Measurement]:
    """The teacher's measurement and the student's that a goal speaks of.

    What the goal leaves out is as in a report's headline: the first engine and lengths, requests
    sent at once, the largest batch that the teacher was measured at.
    """
    own = profile.measurements.get(model, ())
    teacher = profile.measurements.get(TEACHER, ())
    fitting = [m for m in teacher or own if _is_at(m, place)]
    if not fitting:
        raise NotMeasuredError("no such workload was measured")
    at_once = [m for m in fitting if m.mode == OFFLINE] or fitting
    first = at_once[0]
    alike = [m for m in at_once if _same_but_load(m, first)]
    base = max(alike, key=lambda m: m.load)
    load = base.load
    if place.same_memory:
        load = _load_in_same_memory(profile, model, base)
    found = next((m for m in own if _same_but_load(m, base) and m.load == load), None)
    if found is None:
        raise NotMeasuredError(f"{model} was not measured with {_loaded(base, load)}")
    return base if teacher else None, found


def _is_at(measured: Measurement, place: Place) -> bool:
    if place.load is not None and (measured.mode, measured.load) != (
        _MODE[place.load[0]], place.load[1],
    ):  # fmt: skip
        return False
    if place.same_memory and measured.mode != OFFLINE:
        return False
    lengths = (measured.input_len, measured.output_len)
    return place.engine in (None, measured.engine) and place.lengths in (None, lengths)


def _same_but_load(one: Measurement, other: Measurement) -> bool:
    keys = ("engine", "mode", "input_len", "output_len")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def _load_in_same_memory(profile: ProfileResult, model: str, base: Measurement) -> float:
    for speedup in profile.speedups:
        at = (speedup.engine, speedup.input_len, speedup.output_len, speedup.teacher_load)
        if (speedup.rule, speedup.model) == (SAME_MEMORY, model) and at == (
            base.engine, base.input_len, base.output_len, base.load,
        ):  # fmt: skip
            return speedup.load
    raise NotMeasuredError("no batch in the teacher's memory was measured")


def _about(own: Measurement, base: Measurement | None) -> str:
    """Where a figure was measured, and what makes it doubtful."""
    at = f"{own.engine}, {_loaded(own, own.load)}, {own.input_len} + {own.output_len} tokens"
    if base is not None and base.load != own.load:
        at += f", in the memory of the teacher's {_loaded(base, base.load)}"
    flags = dict.fromkeys((*(base.flags if base else ()), *own.flags))
    return "; ".join([at, *(FLAGS[flag] for flag in flags)])


def _loaded(measured: Measurement, load: float) -> str:
    return f"{load:g} {MODES[measured.mode]}"


def _said(count: int, coverage: float) -> str:
    if count < 2:
        return "; one repeat, of which no spread is known"
    return f"; {count} repeats, interval of {coverage:.0%}"
