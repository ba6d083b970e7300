"""What a choice between models rests on: accuracies, workloads, and who is dominated by whom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from paretron_profiling import figures
from paretron_profiling.models import TEACHER
from paretron_profiling.report.schema import Model, Report, Speed
from paretron_profiling.schema import Workload


@dataclass(frozen=True)
class Interval:
    """A value and what it may be; low and high are the value itself where nothing is known."""

    value: float
    low: float
    high: float
    known: bool = True

    @classmethod
    def of(cls, value: float | None, low: float | None, high: float | None) -> Interval | None:
        """None without a value."""
        if value is None:
            return None
        if low is None or high is None:
            return cls(value, value, value, known=False)
        return cls(value, low, high)

    def beyond(self, other: Interval) -> bool:
        """Whether two intervals are known to have nothing in common."""
        apart = self.low > other.high or self.high < other.low
        return apart and self.known and other.known


@dataclass(frozen=True)
class Accuracy:
    """One measure of quality, by model; `key` is "loss", "perplexity.TEXT" or "task.NAME"."""

    key: str
    label: str
    unit: str
    higher_is_better: bool
    values: dict[str, Interval]


@dataclass(frozen=True)
class Dominated:
    """A model that another one beats or equals in both respects.

    `sure` is false where the intervals leave it open, None where one of them is not known.
    """

    model: str
    by: str
    faster: bool
    better: bool
    sure: bool | None


def accuracies(report: Report) -> list[Accuracy]:
    """Every measure of quality that at least one model has: losses, perplexities, then tasks."""
    losses = {m.name: _loss(m) for m in report.models}
    out = [Accuracy("loss", "final loss", "nats a token", False, _known(losses))]
    for text in dict.fromkeys(t for m in report.models for t in m.perplexity):
        values = {m.name: _perplexity(m, text) for m in report.models}
        out.append(
            Accuracy(
                f"perplexity.{text}", f"perplexity on {label(text)}", "", False, _known(values)
            )
        )
    for name, task in {n: t for m in report.models for n, t in m.tasks.items()}.items():
        found = {m.name: m.tasks[name] for m in report.models if name in m.tasks}
        values = {n: Interval.of(t.value, t.low, t.high) for n, t in found.items()}
        said = f"{label(name)} ({label(task.metric)})"
        out.append(Accuracy(f"task.{name}", said, "", task.higher_is_better, _known(values)))
    return [a for a in out if a.values]


def _known(values: dict[str, Interval | None]) -> dict[str, Interval]:
    return {name: value for name, value in values.items() if value is not None}


def _loss(model: Model) -> Interval | None:
    text = model.final_text
    low, high = (text.low, text.high) if text is not None else (None, None)
    return Interval.of(model.loss.final, low, high)


def _perplexity(model: Model, text: str) -> Interval | None:
    """With the interval of the loss that it is the exponential of."""
    found = model.texts.get(text)
    ends = (None, None) if found is None else (found.low, found.high)
    low, high = (math.exp(n) if n is not None and n < 700 else None for n in ends)
    return Interval.of(model.perplexity.get(text), low, high)


def workload(speed: Speed) -> Workload:
    """What a measurement is of."""
    return Workload(speed.engine, speed.mode, speed.load, speed.input_len, speed.output_len)


def workloads(report: Report) -> list[Workload]:
    """What the teachers were measured on, in order; all that was measured, where there is none."""
    teachers = [m for m in report.models if m.kind == TEACHER and m.speed] or report.models
    return list(dict.fromkeys(workload(s) for m in teachers for s in m.speed))


def workload_words(work: Workload) -> str:
    """ "vllm, batch 4, 128 + 128 tokens"."""
    load = figures.load(work.mode, work.load)
    return f"{work.engine}, {load}, {work.input_len} + {work.output_len} tokens"


def headline_workload(report: Report) -> Workload | None:
    """The workload that the headlines speak of: the first of the students' headlines.

    Without ratios the largest load that all models share, on the first engine and lengths.
    """
    found = [s for m in report.students if (s := report.headline_speedup(m.name))]
    if not found:
        works = workloads(report)
        counts = {w: sum(workload(s) == w for m in report.models for s in m.speed) for w in works}
        shared = [w for w in works if counts[w] == max(counts.values())]
        alike = [w for w in shared if replace(w, load=shared[0].load) == shared[0]]
        return max(alike, key=lambda w: w.load, default=None)
    s = found[0]
    return Workload(s.engine, s.mode, s.load, s.input_len, s.output_len)


def throughputs(report: Report, work: Workload) -> dict[str, Interval]:
    """Output tokens/s of every model under a workload, with its interval; none of one repeat."""
    found = {m.name: s for m in report.models for s in m.speed if workload(s) == work}
    values = {
        name: Interval.of(
            s.output_tok_s, *(s.repeats > 1 and s.interval("output_tok_s")) or (None, None)
        )
        for name, s in found.items()
    }
    return _known(values)


def dominated(
    speeds: dict[str, Interval], accuracy: Accuracy, *, order: Sequence[str]
) -> list[Dominated]:
    """The models that another one beats or equals in speed and accuracy, not equal in both.

    The one named is the most accurate of those that do, of those first that do so for sure.
    """
    sign = 1.0 if accuracy.higher_is_better else -1.0
    known = [n for n in order if n in speeds and n in accuracy.values]
    at = {n: (speeds[n].value, sign * accuracy.values[n].value) for n in known}
    out = []
    for name in known:
        above = [
            o for o in known
            if at[o] != at[name] and at[o][0] >= at[name][0] and at[o][1] >= at[name][1]
        ]  # fmt: skip
        if not above:
            continue
        figures_of = speeds, accuracy.values
        sure = {o: _sure([(f[o], f[name]) for f in figures_of]) for o in above}
        by = max(above, key=lambda o: (sure[o] is True, at[o][1], at[o][0]))
        faster, better = (b != a for b, a in zip(at[by], at[name], strict=True))
        out.append(Dominated(name, by, faster, better, sure[by]))
    return out


def _sure(pairs: Sequence[tuple[Interval, Interval]]) -> bool | None:
    """Whether one model is beyond another in every figure that is not the same of both."""
    other = [(one, two) for one, two in pairs if one.value != two.value]
    if not all(one.known and two.known for one, two in other):
        return None
    return all(one.beyond(two) for one, two in other)


def frontier_words(
    speeds: dict[str, Interval], accuracy: Accuracy, *, report: Report
) -> tuple[str, ...]:
    """Who is on the frontier, and of every other one who dominates it."""
    order = [m.name for m in report.models]
    known = [n for n in order if n in speeds and n in accuracy.values]
    found = dominated(speeds, accuracy, order=order)
    beaten = {d.model for d in found}
    on = [label(n) for n in known if n not in beaten]
    if len(known) < 2:
        return ()
    verb = "is" if len(on) == 1 else "are"
    return (f"{listed(on)} {verb} on the frontier.", *map(_dominated_words, found))


def _dominated_words(found: Dominated) -> str:
    how = " and ".join(
        word for word, holds in (("faster", found.faster), ("better", found.better)) if holds
    )
    doubt = {True: "", False: ", within the noise", None: ", by medians of unknown spread"}
    return f"{label(found.model)} is dominated: {label(found.by)} is {how}{doubt[found.sure]}."


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def label(name: str) -> str:
    """A model's name on one line of bounded length."""
    one_line = " ".join(name.split()) or "(no name)"
    return one_line if len(one_line) <= 60 else one_line[:57] + "..."
