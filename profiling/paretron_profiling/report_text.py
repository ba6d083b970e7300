"""The sentences of a report, computed from its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from paretron_profiling import figures
from paretron_profiling.compare import SAME_MEMORY
from paretron_profiling.report_schema import Model, Report, Speedup, loss_above
from paretron_profiling.schema import FLAGS

# Losses closer than this are called equal: what it says is no more exact.
SAME_NATS = 0.005


@dataclass(frozen=True)
class Headline:
    """What is said about one student: "1.38× faster" and "+0.11 nats"."""

    model: str
    speed: str
    loss: str
    speed_note: str

    @property
    def sentence(self) -> str:
        """The one line: "width: 1.38× faster, +0.11 nats"."""
        parts = [p for p in (self.speed, self.loss) if p]
        return f"{self.model}: {', '.join(parts) or 'not measured'}"


def headlines(report: Report) -> tuple[Headline, ...]:
    """One headline a student, in the report's order."""
    return tuple(_headline(report, m) for m in report.students)


def _headline(report: Report, model: Model) -> Headline:
    ratio = report.headline_speedup(model.name)
    above = loss_above(model, teacher=report.teacher)
    return Headline(
        model.name,
        speed_words(ratio),
        "" if above is None else f"{figures.signed_nats(above)} nats",
        "" if ratio is None else interval_words(ratio),
    )


def speed_words(speedup: Speedup | None) -> str:
    """ "1.38× faster", "1.20× slower", or that there is no difference beyond the noise."""
    if speedup is None or speedup.ratio is None:
        return ""
    low, high = speedup.interval
    if low is not None and high is not None and low <= 1 <= high:
        return f"as fast as the teacher within the noise ({figures.times(speedup.ratio)})"
    if speedup.ratio >= 1:
        return f"{figures.times(speedup.ratio)} faster"
    return f"{figures.times(1 / speedup.ratio)} slower"


def interval_words(speedup: Speedup) -> str:
    """The interval of a ratio, with what it promises."""
    low, high = speedup.interval
    if speedup.pairs < 2:
        return "one run only"
    sure = figures.percent(min(speedup.coverage, 0.99))
    return (
        f"{figures.times(low)} to {figures.times(high)} ({speedup.pairs} pairs, {sure} confidence)"
    )


def verdict(report: Report) -> str:
    """Which student is faster, which is better: the page's first sentence."""
    students = report.students
    if not students:
        return "No student was made"
    if len(students) == 1:
        return headlines(report)[0].sentence
    fastest, tied = _fastest(report)
    best, close = _best(report)
    if fastest is None and best is None:
        return f"{len(students)} students, not yet measured"
    if fastest is None or best is None:
        return f"{(fastest or best)} {'is the faster' if fastest else 'is the better'} student"
    if tied and close:
        return "No student stands out: equal speed and equal loss within the noise"
    said = {h.model: h for h in headlines(report)}
    if tied:
        same = f"in speed the students do not differ beyond the noise ({said[best].speed})"
        return f"{best} is better at {said[best].loss}; {same}"
    if close:
        same = f"in loss the students do not differ ({said[fastest].loss})"
        return f"{fastest} is {said[fastest].speed}; {same}"
    if fastest == best:
        return f"{said[fastest].sentence}: both the fastest and the best student"
    return f"{fastest} is {said[fastest].speed}, {best} is better at {said[best].loss}"


def _fastest(report: Report) -> tuple[str | None, bool]:
    """The fastest student, and whether the runner-up's interval overlaps with its own."""
    found = [(m.name, report.headline_speedup(m.name)) for m in report.students]
    ranked = sorted(
        ((s.ratio, s, name) for name, s in found if s is not None and s.ratio is not None),
        key=lambda row: -row[0],
    )
    if not ranked:
        return None, False
    if len(ranked) == 1:
        return ranked[0][2], False
    low, high = ranked[0][1].interval[0], ranked[1][1].interval[1]
    return ranked[0][2], low is None or high is None or low <= high


def _best(report: Report) -> tuple[str | None, bool]:
    """The student of the lowest loss, and whether the runner-up's is the same."""
    losses = [(m.loss.final, m.name) for m in report.students if m.loss.final is not None]
    ranked = sorted(losses)
    if not ranked:
        return None, False
    return ranked[0][1], len(ranked) > 1 and ranked[1][0] - ranked[0][0] < SAME_NATS


def captions(report: Report) -> list[str]:
    """How the numbers came about, and what is doubtful about them; the caller's own ones last."""
    out = []
    if report.hardware:
        out.append(_hardware(report))
    for name, about in report.engines.items():
        out.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in about.items()) + ".")
    if report.method:
        out.append(_method(report))
    memory = next((s for s in report.speedup if s.rule == SAME_MEMORY), None)
    if report.speedup:
        out.append(
            "same batch: student and teacher at the same batch. same memory: the teacher at its "
            "largest batch, the student at the largest batch whose weights and KV cache take no "
            "more, computed from their sizes"
            + (f" (here {figures.size(memory.memory_bytes)})" if memory else "")
            + ". Ratios are of output tokens/s, prefill included, paired by round."
        )
    if report.seed is not None:
        out.append(f"Seed {report.seed}: one run of one seed; losses differ between seeds.")
    return [*out, *report.captions]


def doubts(report: Report) -> list[str]:
    """Every flagged measurement, in words."""
    return [
        f"{m.name} on {s.engine}, batch {s.batch}, {s.input_len} + {s.output_len} tokens: "
        + ", ".join(FLAGS.get(f, f) for f in s.flags)
        + (f" (spread {figures.percent(s.spread)})" if s.spread is not None else "")
        for m in report.models
        for s in m.speed
        if s.flags
    ]


def _hardware(report: Report) -> str:
    h = report.hardware
    return (
        f"Measured on {h.get('cpu', 'an unknown CPU')}, {h.get('cores', '?')} cores, "
        f"{h.get('threads', '?')} threads, {figures.size(_number(h.get('memory_bytes')))} memory, "
        f"{h.get('os', 'unknown system')}, on {h.get('date', report.created)}; "
        f"OMP_NUM_THREADS {h.get('omp_num_threads', 'not set')}, load before the first run "
        f"{h.get('load_1m', '?')}."
    )


def _method(report: Report) -> str:
    m = report.method
    return (
        f"Each figure is the median of {m.get('repeats', '?')} repeats after "
        f"{m.get('warmup', '?')} warm-up; {m.get('order', '')}. Prompts: {m.get('prompts', '')}. "
        f"Decoding: {m.get('decoding', '')}. TTFT: from sending the batch to a request's first "
        "token. TPOT: (end - first token) / (output tokens - 1). Prefill tokens/s count the "
        "prompts until the whole batch had its first token. Spread is (max - min) / median of "
        "output tokens/s. A ratio is the median over pairs of runs of the same round; its interval "
        "is the narrowest one that holds the true median with 95 %, or the whole range with what "
        "that promises where the pairs are too few."
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
