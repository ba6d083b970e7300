"""What the page shows at a glance: cards of the students, and the data of its figures."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from paretron_profiling import figures
from paretron_profiling.report_schema import (
    Model,
    Report,
    Speedup,
    won_back,
)
from paretron_profiling.report_tables import RULES, curve_name, label, thin
from paretron_profiling.report_text import Headline, headlines, interval_words, speed_words
from paretron_profiling.schema import FLAGS

# Dark enough on white for text (at least 4.5 : 1), told apart without red and green.
TEACHER_COLOUR = "#3b4252"
COLOURS = ("#0b66b2", "#b84a00", "#00756a", "#8a3fa0", "#7a5c00", "#a3255a")
SYMBOLS = ("circle", "square", "triangle-up", "star", "cross", "hexagon")

CURVE_POINTS = 400


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


def cards(report: Report) -> tuple[Card, ...]:
    """One card a student, in the report's order."""
    return tuple(
        _card(report, model, head)
        for model, head in zip(report.students, headlines(report), strict=True)
    )


def _card(report: Report, model: Model, head: Headline) -> Card:
    memory, teacher = report.memory_speedup(model.name), report.teacher
    shares = (
        ("Parameters", figures.count(model.params), teacher and model.params / teacher.params),
        (
            "KV cache per token",
            figures.size(model.kv_bytes_per_token),
            teacher and model.kv_bytes_per_token / teacher.kv_bytes_per_token,
        ),
    )
    facts = [
        (n, v + (f", {figures.percent(s)} of the teacher's" if s else "")) for n, v, s in shares
    ]
    return Card(
        name=label(model.name),
        kind=model.kind,
        colour=colours(report)[model.name],
        speed=head.speed,
        loss=head.loss,
        note=head.speed_note,
        memory=speed_words(memory),
        memory_note=f"batch {memory.batch} against {memory.teacher_batch}" if memory else "",
        facts=(*facts, ("Loss won back", figures.percent(won_back(model, teacher=teacher)))),
    )


def headline_words(report: Report) -> str:
    """The workload that the headlines speak of."""
    found = [s for m in report.students if (s := report.headline_speedup(m.name))]
    if not found:
        return ""
    s = found[0]
    return f"{s.engine}, batch {s.batch}, {s.input_len} tokens in and {s.output_len} out"


def payload(report: Report) -> dict[str, Any]:
    """What the page's script draws."""
    colour, teacher = colours(report), report.teacher
    students = [m.name for m in report.students]
    return {
        "models": [
            {
                "name": m.name,
                "label": label(m.name),
                "teacher": teacher is not None and m.name == teacher.name,
                "colour": colour[m.name],
                "symbol": "diamond"
                if m.name not in students
                else SYMBOLS[students.index(m.name) % len(SYMBOLS)],
                "loss": m.loss.final,
                "facts": _facts(m),
                "speed": [s.model_dump(mode="json") for s in m.speed],
            }
            for m in report.models
        ],
        "speedup": [_speedup_point(s) for s in report.speedup],
        "curves": [
            {
                "model": c.model,
                "group": curve_name(c),
                "colour": colour.get(c.model, TEACHER_COLOUR),
                "points": thin(list(zip(c.tokens, c.values, strict=True)), CURVE_POINTS),
            }
            for c in report.curves
        ],
        "headline": _headline_workload(report),
        "flags": dict(FLAGS),
    }


def _facts(model: Model) -> list[str]:
    facts = [
        f"{figures.count(model.params)} parameters",
        f"{figures.size(model.weight_bytes)} weights",
        f"{figures.size(model.kv_bytes_per_token)} KV cache per token",
    ]
    return facts + [f"perplexity {figures.plain(v)} ({k})" for k, v in model.perplexity.items()]


def _speedup_point(speedup: Speedup) -> dict[str, Any]:
    words = {"rule_words": RULES[speedup.rule], "interval_words": interval_words(speedup)}
    return speedup.model_dump(mode="json") | words


def _headline_workload(report: Report) -> dict[str, Any] | None:
    for model in report.students:
        if found := report.headline_speedup(model.name):
            return found.model_dump(
                mode="json", include={"engine", "batch", "input_len", "output_len"}
            )
    return None
