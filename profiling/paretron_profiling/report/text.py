"""The sentences of a report, computed from its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretron_profiling import figures
from paretron_profiling.compare import SAME_BATCH, SAME_LATENCY, SAME_MEMORY
from paretron_profiling.report.choice import (
    headline_workload,
    label,
    listed,
    throughputs,
    workload_words,
)
from paretron_profiling.report.schema import Model, Report, Speedup, loss_above
from paretron_profiling.schema import FLAGS, OFFLINE

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
        return f"{label(self.model)}: {', '.join(parts) or 'not measured'}"


def headlines(report: Report) -> tuple[Headline, ...]:
    """One headline a student, in the report's order."""
    return tuple(_headline(report, m) for m in report.students)


def _headline(report: Report, model: Model) -> Headline:
    ratio = report.headline_speedup(model.name)
    above = loss_above(model, teacher=report.teacher_of(model))
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
    if speedup.pairs == 0:
        return "medians of separate runs, not paired"
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
        return "No student was made" if report.teacher else "Nothing was measured"
    if len(students) == 1:
        return headlines(report)[0].sentence
    if report.teacher is None and all(m.kind == "profiled" for m in students):
        return _fastest_profiled(report)
    (fastest, tied), (best, close) = _fastest(report), _best(report)
    if not fastest and not best:
        return _said_alone(report)
    if not fastest or not best:
        how = ("faster", "fastest") if fastest else ("better", "best")
        these = fastest or best
        if tied or close:
            return f"No student stands out: equal {'speed' if fastest else 'loss'} within the noise"
        student = "student" if len(these) == 1 else "students"
        return f"{_are(these)} the {how[len(students) > 2]} {student}"
    if tied and close:
        return "No student stands out: equal speed and equal loss within the noise"
    said = {h.model: h for h in headlines(report)}
    speed, loss = said[fastest[0]].speed, said[best[0]].loss
    if tied:
        same = f"in speed the students do not differ beyond the noise ({said[best[0]].speed})"
        return f"{_are(best)} better at {loss}; {same}"
    if close:
        return f"{_are(fastest)} {speed}; in loss the students do not differ ({loss})"
    if fastest == best and len(best) == 1:
        return f"{said[best[0]].sentence}: both the fastest and the best student"
    return f"{_are(fastest)} {speed}, {_are(best)} better at {loss}"


def _are(names: list[str]) -> str:
    """Who something is said of: "width is", "a/width and b/width are"."""
    return f"{listed([label(n) for n in names])} {'is' if len(names) == 1 else 'are'}"


def _fastest_profiled(report: Report) -> str:
    """Of models that nobody is the teacher of: which one gives the most tokens a second."""
    work = headline_workload(report)
    speeds = throughputs(report, work) if work else {}
    if work is None or not speeds:
        return f"{len(report.models)} models, nothing measured"
    ranked = sorted(speeds, key=lambda name: -speeds[name].value)
    first = f"{label(ranked[0])} is the fastest at {figures.plain(speeds[ranked[0]].value)}"
    if len(ranked) > 1 and not speeds[ranked[0]].beyond(speeds[ranked[1]]):
        first = f"{label(ranked[0])} and {label(ranked[1])} do not differ beyond the noise"
        return f"{first} ({workload_words(work)})"
    return f"{first} output tokens/s ({workload_words(work)})"


def _said_alone(report: Report) -> str:
    """What there is to say where no figure is known of two students."""
    said = [h.sentence for h in headlines(report) if h.speed or h.loss]
    return "; ".join(said[:2]) or f"{len(report.students)} students, not yet measured"


def _fastest(report: Report) -> tuple[list[str], bool]:
    """The fastest of several students, with those whose intervals overlap its own; are they all."""
    found = [(m.name, report.headline_speedup(m.name)) for m in report.students]
    ranked = sorted(
        ((s.ratio, s, name) for name, s in found if s is not None and s.ratio is not None),
        key=lambda row: -row[0],
    )
    if len(ranked) < 2:
        return [], False
    low = ranked[0][1].interval[0]
    ends = [(name, s.interval[1]) for _, s, name in ranked]
    leading = [
        name
        for place, (name, high) in enumerate(ends)
        if place == 0 or low is None or high is None or low <= high
    ]
    return leading, len(leading) == len(ranked)


def _best(report: Report) -> tuple[list[str], bool]:
    """Those of several students with the lowest loss, to what is called equal; are they all."""
    ranked = sorted((m.loss.final, m.name) for m in report.students if m.loss.final is not None)
    if len(ranked) < 2:
        return [], False
    found = [name for loss, name in ranked if loss - ranked[0][0] < SAME_NATS]
    return found, len(found) == len(ranked)


def conditions(report: Report) -> list[tuple[str, list[str]]]:
    """How the numbers came about, in groups with a title; the caller's own sentences last."""
    system = [_hardware(report)] if report.hardware else []
    if report.device:
        system.append(_device(report.device))
    software = [
        f"{name}: {', '.join(f'{k} {_said(v)}' for k, v in about.items())}."
        for name, about in report.engines.items()
    ]
    if report.versions:
        software.append(", ".join(f"{k} {v}" for k, v in report.versions.items()) + ".")
    run = list(report.captions)
    if report.seed is not None:
        run.insert(0, f"Seed {report.seed}: one run of one seed; losses differ between seeds.")
    groups = (
        ("System", system),
        ("Software", software),
        ("Method", [_method(report.method)] if report.method else []),
        ("What the figures mean", _meanings(report) if report.method else []),
        ("Rules of comparison", _rules(report)),
        ("This run" if not report.runs else "These runs", run),
    )
    return [(title, lines) for title, lines in groups if lines]


def doubts(report: Report) -> list[str]:
    """Every flagged measurement, in words."""
    return [
        f"{label(m.name)} on {s.engine}, {figures.load(s.mode, s.load)}, "
        f"{s.input_len} + {s.output_len} tokens: "
        + ", ".join(FLAGS.get(f, f) for f in s.flags)
        + (f" (spread {figures.percent(s.spread)})" if s.spread is not None else "")
        for m in report.models
        for s in m.speed
        if s.flags
    ]


def _hardware(report: Report) -> str:
    h = report.hardware
    known = {
        "cpu", "cores", "threads", "memory_bytes", "os", "date", "omp_num_threads", "load_1m",
    }  # fmt: skip
    more = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in h.items() if k not in known)
    return (
        f"Measured on {h.get('cpu', 'an unknown CPU')}, {h.get('cores', '?')} cores, "
        f"{h.get('threads', '?')} threads, {figures.size(_number(h.get('memory_bytes')))} memory, "
        f"{h.get('os', 'unknown system')}, on {h.get('date', report.created)}; "
        f"OMP_NUM_THREADS {h.get('omp_num_threads', 'not set')}, load before the first run "
        f"{h.get('load_1m', '?')}{'; ' + more if more else ''}."
    )


def _device(device: Mapping[str, Any]) -> str:
    """What the probe found the device to do."""
    rates = device.get("flop_s") or {}
    known = {name: rate for name, rate in rates.items() if isinstance(rate, (int, float))}
    parts = [
        f"{figures.size(_number(device.get('bandwidth_bytes_s')))}/s from memory",
        *(f"{figures.plain(rate / 1e9)} GFLOP/s in {name}" for name, rate in known.items()),
    ]
    return f"{device.get('name', 'The device')} by a short probe: {', '.join(parts)}."


def _method(method: Mapping[str, Any]) -> str:
    told = {"repeats", "warmup", "order", "prompts", "decoding"}
    more = ", ".join(
        f"{k.replace('_', ' ')} {_said(v)}" for k, v in method.items() if k not in told
    )
    parts = [
        f"Each figure is the median of {method.get('repeats', '?')} repeats after "
        f"{method.get('warmup') or 'no known'} warm-up",
        str(method.get("order", "")),
        f"prompts: {method['prompts']}" if method.get("prompts") else "",
        f"decoding: {method['decoding']}" if method.get("decoding") else "",
        more,
    ]
    return "; ".join(p for p in parts if p) + "."


def _meanings(report: Report) -> list[str]:
    """The definitions, those of loops only where there are loops."""
    out = [
        "TTFT: from sending a request to its first token. TPOT: (end - first token) / (output "
        "tokens - 1). Prefill tokens/s count the prompts until the whole batch had its first "
        "token. Spread is (max - min) / median of output tokens/s, in an open loop of E2E.",
    ]
    if any(s.mode != OFFLINE for m in report.models for s in m.speed):
        out.append(
            "ITL: the time between successive chunks of tokens. E2E: from sending a request to its "
            "last token. Goodput: completed requests a second whose TTFT and TPOT both meet the "
            "limits. Percentiles are over all requests of all repeats."
        )
    return out


def _rules(report: Report) -> list[str]:
    """What each rule of comparison means, of those that were used."""
    used = {s.rule for s in report.speedup}
    memory = next((s for s in report.speedup if s.rule == SAME_MEMORY), None)
    here = f" (here {figures.size(memory.memory_bytes)})" if memory else ""
    said = {
        SAME_BATCH: "Same batch: student and teacher under the same load.",
        SAME_MEMORY: (
            "Same memory: the teacher at its largest batch, the student at the largest batch whose "
            f"weights and KV cache take no more, computed from their sizes{here}."
        ),
        SAME_LATENCY: (
            "Same latency: each at the load that gave it the most output tokens/s with medians of "
            "TTFT and TPOT within the limits."
        ),
    }
    out = [words for rule, words in said.items() if rule in used]
    if out:
        out.append(
            "A ratio is the median over pairs of runs of the same round, of output tokens/s with "
            "prefill included where nothing else is said; its interval is the narrowest one that "
            "holds the true median with 95 %, or the whole range with what that promises where the "
            "pairs are too few. It holds what varies between rounds; what differs between starts "
            "of an engine it holds only where each round had a new one (sessions: in_turn)."
        )
    return out


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
