"""What the page shows at a glance: cards of the students, and the data of its figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from paretron_profiling import figures
from paretron_profiling.models import TEACHER
from paretron_profiling.report.choice import (
    Accuracy,
    Interval,
    accuracies,
    dominated,
    frontier_words,
    headline_workload,
    label,
    throughputs,
    workload_words,
    workloads,
)
from paretron_profiling.report.schema import Model, Report, Speedup, loss_above, share, won_back
from paretron_profiling.report.tables import RULES, curve_name, thin
from paretron_profiling.report.text import Headline, headlines, interval_words, speed_words
from paretron_profiling.schema import FLAGS

# Dark enough on white for text (at least 4.5 : 1), told apart without red and green.
TEACHER_COLOUR = "#3b4252"
COLOURS = ("#0b66b2", "#b84a00", "#00756a", "#8a3fa0", "#7a5c00", "#a3255a")
SYMBOLS = ("circle", "square", "triangle-up", "star", "cross", "hexagon")

CURVE_POINTS = 400
CARD_TASKS = 4
VERDICTS = ("met", "missed", "undecided", "absent")


def moment(created: str) -> str:
    """A point in time as people read it: "2026-11-22 16:40 UTC"; other text as it is."""
    try:
        at = datetime.fromisoformat(created)
    except ValueError:
        return created
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if at.tzinfo else created


def colours(report: Report) -> dict[str, str]:
    """A colour for each model, stable within a report."""
    out = {m.name: COLOURS[i % len(COLOURS)] for i, m in enumerate(report.students)}
    return {m.name: out.get(m.name, TEACHER_COLOUR) for m in report.models}


@dataclass(frozen=True)
class Card:
    """One student at a glance."""

    name: str
    kind: str
    colour: str
    speed: str
    loss: str
    note: str
    memory: str
    memory_note: str
    facts: tuple[tuple[str, str], ...]
    goals: tuple[tuple[str, int], ...]  # verdict, how many


def cards(report: Report) -> tuple[Card, ...]:
    """One card a student, in the report's order."""
    return tuple(
        _card(report, model, head)
        for model, head in zip(report.students, headlines(report), strict=True)
    )


def _card(report: Report, model: Model, head: Headline) -> Card:
    memory, teacher = report.memory_speedup(model.name), report.teacher_of(model)
    shares = (
        (
            "Parameters",
            figures.count(model.params),
            model.params,
            teacher.params if teacher else None,
        ),
        (
            "KV cache per token",
            figures.size(model.kv_bytes_per_token),
            model.kv_bytes_per_token,
            teacher.kv_bytes_per_token if teacher else None,
        ),
    )
    facts = [
        (n, v + (f", {figures.percent(part)} of the teacher's" if part else ""))
        for n, v, own, whole in shares
        if own is not None
        for part in [share(own, whole)]
    ]
    if (back := won_back(model, teacher=teacher)) is not None:
        facts.append(("Loss won back", figures.percent(back)))
    facts += _task_facts(model)
    return Card(
        name=label(model.name),
        kind=model.kind,
        colour=colours(report)[model.name],
        speed=head.speed,
        loss=head.loss,
        note=head.speed_note,
        memory=speed_words(memory),
        memory_note=f"batch {memory.load:g} against {memory.teacher_load:g}" if memory else "",
        facts=tuple(facts),
        goals=tuple((v, n) for v in VERDICTS if (n := _count(report, model, v))),
    )


def _task_facts(model: Model) -> list[tuple[str, str]]:
    """A few tasks with their distance from the teacher; the table has them all."""
    found = []
    for name, task in list(model.tasks.items())[:CARD_TASKS]:
        apart = model.differences.get(f"task.{name}")
        behind = "" if apart is None or apart.value is None else f", {figures.signed(apart.value)}"
        found.append((label(name), figures.plain(task.value) + behind))
    return found


def _count(report: Report, model: Model, verdict: str) -> int:
    return sum(g.model == model.name and g.verdict == verdict for g in report.goals)


def has_loads(report: Report) -> bool:
    """Whether some model was measured under several loads of one kind, as a curve needs."""
    kinds = [
        (m.name, s.engine, s.mode, s.input_len, s.output_len)
        for m in report.models
        for s in m.speed
        if s.tpot_ms
    ]
    return len(kinds) > len(set(kinds))


def headline_words(report: Report) -> str:
    """The workload that the headlines speak of."""
    found = [s for m in report.students if (s := report.headline_speedup(m.name))]
    if not found:
        return ""
    s = found[0]
    load = figures.load(s.mode, s.load)
    return f"{s.engine}, {load}, {s.input_len} tokens in and {s.output_len} out"


def payload(report: Report) -> dict[str, Any]:
    """What the page's script draws."""
    colour = colours(report)
    works = workloads(report)
    headline = headline_workload(report)
    measures = accuracies(report)
    return {
        "models": [_model_point(report, m, colour[m.name]) for m in report.models],
        "speedup": [_speedup_point(s) for s in report.speedup],
        "workloads": [{**asdict(w), "name": workload_words(w)} for w in works],
        "headline": works.index(headline) if headline in works else 0,
        "accuracies": [_accuracy(a) for a in measures],
        "frontier": [
            [_frontier(report, throughputs(report, w), a) for a in measures] for w in works
        ],
        "curves": [
            {
                "model": c.model,
                "group": curve_name(c),
                "colour": colour.get(c.model, TEACHER_COLOUR),
                "points": thin(list(zip(c.tokens, c.values, strict=True)), CURVE_POINTS),
            }
            for c in report.curves
        ],
        "roofline": report.roofline.model_dump(mode="json")["rows"] if report.roofline else [],
        "importance": report.importance and report.importance.model_dump(mode="json"),
        "devices": {name: _devices(about) for name, about in report.engines.items()},
        "flags": dict(FLAGS),
    }


def _model_point(report: Report, model: Model, colour: str) -> dict[str, Any]:
    students = [m.name for m in report.students]
    at = students.index(model.name) if model.name in students else None
    turn = 0 if at is None else at + at // len(SYMBOLS)
    return {
        "name": model.name,
        "label": label(model.name),
        "teacher": model.kind == TEACHER,
        "colour": colour,
        "symbol": "diamond" if at is None else SYMBOLS[turn % len(SYMBOLS)],
        "loss": model.loss.final,
        "above": _above(report, model),
        "of": model.teacher if report.runs else (report.teacher and report.teacher.name),
        "weights": model.weight_bytes,
        "facts": _facts(model),
        "speed": [
            s.model_dump(mode="json") | {"memory": model.memory_bytes(s)} for s in model.speed
        ],
    }


def _above(report: Report, model: Model) -> float | None:
    """Nats above the teacher; 0 of a teacher itself."""
    if model.kind == TEACHER:
        return None if model.loss.final is None else 0.0
    return loss_above(model, teacher=report.teacher_of(model))


def _accuracy(accuracy: Accuracy) -> dict[str, Any]:
    values = {n: [v.value, v.low, v.high] for n, v in accuracy.values.items()}
    return {
        "key": accuracy.key, "label": accuracy.label, "unit": accuracy.unit,
        "higher": accuracy.higher_is_better, "values": values,
    }  # fmt: skip


def _frontier(report: Report, speeds: dict[str, Interval], accuracy: Accuracy) -> dict[str, Any]:
    found = dominated(speeds, accuracy, order=[m.name for m in report.models])
    return {
        "dominated": [d.model for d in found],
        "words": list(frontier_words(speeds, accuracy, report=report)),
    }


def _devices(about: dict[str, Any]) -> int:
    """Over how many devices an engine ran; one where it does not say."""
    count = about.get("devices", 1)
    return count if isinstance(count, int) and count > 0 else 1


def _facts(model: Model) -> list[str]:
    facts = []
    if model.params is not None:
        facts.append(f"{figures.count(model.params)} parameters")
    if model.weight_bytes is not None:
        facts.append(f"{figures.size(model.weight_bytes)} weights")
    if model.kv_bytes_per_token is not None:
        facts.append(f"{figures.size(model.kv_bytes_per_token)} KV cache per token")
    return facts + [f"perplexity {figures.plain(v)} ({k})" for k, v in model.perplexity.items()]


def _speedup_point(speedup: Speedup) -> dict[str, Any]:
    words = {"rule_words": RULES[speedup.rule], "interval_words": interval_words(speedup)}
    return speedup.model_dump(mode="json") | words
