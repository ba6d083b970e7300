"""What the page shows: rows of its tables, and the data of its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from paretron_profiling import figures
from paretron_profiling.report_schema import (
    Check,
    Curve,
    Model,
    Report,
    Speedup,
    loss_above,
    won_back,
)
from paretron_profiling.report_text import Headline, headlines, interval_words, speed_words
from paretron_profiling.schema import FLAGS

# Dark enough on white for text (at least 4.5 : 1), told apart without red and green.
TEACHER_COLOUR = "#3b4252"
COLOURS = ("#0b66b2", "#b84a00", "#00756a", "#8a3fa0", "#7a5c00", "#a3255a")
SYMBOLS = ("circle", "square", "triangle-up", "star", "cross", "hexagon")

CURVE_POINTS = 400
TABLE_POINTS = 8


@dataclass(frozen=True)
class Table:
    """A table: its caption, column heads, and rows; the first cell of a row is its head."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def label(name: str) -> str:
    """A model's name on one line of bounded length."""
    one_line = " ".join(name.split()) or "(no name)"
    return one_line if len(one_line) <= 60 else one_line[:57] + "..."


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


def sizes_table(report: Report) -> Table:
    """Parameters, bytes, and losses of every model."""
    rows = [_size_row(m, report.teacher) for m in report.models]
    heads = ("Model", "Shape", "Parameters", "Without embeddings", "Weights", "KV cache per token")
    losses = ("Perplexity", "Loss when pruned", "Final loss", "Above teacher", "Won back")
    return Table(
        "Sizes and losses (nats a token, on held-out text)", (*heads, *losses), tuple(rows)
    )


def _size_row(model: Model, teacher: Model | None) -> tuple[str, ...]:
    is_teacher = teacher is not None and model.name == teacher.name
    ratio = (
        ""
        if teacher is None or is_teacher
        else f" ({figures.percent(model.params / teacher.params)})"
    )
    values = list(model.perplexity.items())
    perplexity = (
        figures.plain(values[0][1])
        if len(values) == 1
        else ", ".join(f"{figures.plain(v)} ({k})" for k, v in values)
    )
    return (
        label(model.name),
        ", ".join(f"{k} {v}" for k, v in model.shape.items()) or figures.ABSENT,
        figures.count(model.params) + ratio,
        figures.count(model.non_embedding_params),
        figures.size(model.weight_bytes),
        figures.size(model.kv_bytes_per_token),
        perplexity or figures.ABSENT,
        figures.nats(model.loss.pruned),
        figures.nats(model.loss.final),
        figures.ABSENT if is_teacher else figures.signed_nats(loss_above(model, teacher=teacher)),
        figures.ABSENT if is_teacher else figures.percent(won_back(model, teacher=teacher)),
    )


def speed_table(report: Report) -> Table:
    """Every measurement."""
    rows = tuple(
        (
            label(m.name), s.engine, str(s.batch), f"{s.input_len} + {s.output_len}",
            figures.plain(s.output_tok_s), figures.plain(s.prefill_tok_s),
            figures.plain(s.decode_tok_s), figures.plain(s.ttft_ms), figures.plain(s.tpot_ms),
            str(s.repeats), figures.percent(s.spread),
            ", ".join(FLAGS.get(f, f) for f in s.flags) or "none",
        )
        for m in report.models
        for s in m.speed
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Batch", "Tokens in + out", "Output tok/s", "Prefill tok/s",
        "Decode tok/s", "TTFT, ms", "TPOT, ms", "Repeats", "Spread", "Doubts",
    )  # fmt: skip
    return Table("All measurements (medians over the repeats)", heads, rows)


def speedup_table(report: Report) -> Table:
    """Every ratio, with its rule and batches."""
    rows = tuple(
        (
            label(s.model), s.engine, RULES[s.rule], f"{s.input_len} + {s.output_len}",
            str(s.batch) + (" (capped)" if s.limit == "cap" else ""), str(s.teacher_batch),
            figures.times(s.ratio), interval_words(s),
        )
        for s in report.speedup
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Rule", "Tokens in + out", "Batch", "Teacher's batch", "Speed-up",
        "Interval",
    )  # fmt: skip
    return Table("Speed-up over the teacher (output tokens/s)", heads, rows)


RULES = {"same_batch": "same batch", "same_memory": "same memory"}


def artifact_table(report: Report) -> Table:
    """What was written, and which checks it passed."""
    rows = tuple(
        (
            label(m.name), a.to, a.path, a.dtype or figures.ABSENT, figures.size(a.bytes),
            "; ".join(_check_words(c) for c in a.checks) or "none",
        )
        for m in report.models
        for a in m.artifacts
    )  # fmt: skip
    heads = ("Model", "Export", "Folder", "Dtype", "Size", "Checks against the checkpoint")
    return Table("Artifacts", heads, rows)


def _check_words(check: Check) -> str:
    """ "logits passed: max_abs 8.1e-06 (limit 0.0001)": what has a bound is shown with it."""
    bounded = {k: v for k, v in check.measured.items() if check.bounds.get(k) is not None}
    shown = ", ".join(
        f"{k} {_brief(v)} (limit {_brief(check.bounds[k])})" for k, v in bounded.items()
    )
    head = f"{check.about} {'passed' if check.passed else 'FAILED'}"
    return f"{head}: {shown}" if shown else head


def _brief(value: float | None) -> str:
    return figures.ABSENT if value is None else f"{value:.2g}"


def curve_table(report: Report) -> Table:
    """A few points of every curve."""
    rows = tuple(
        (label(c.model), curve_name(c), figures.count(t), figures.nats(v))
        for c in report.curves
        for t, v in _thin(list(zip(c.tokens, c.values, strict=True)), TABLE_POINTS)
    )
    return Table("Training, some points", ("Model", "Curve", "Tokens", "Nats"), rows)


def curve_name(curve: Curve) -> str:
    """ "distillation: validation loss" and the like."""
    stage = STAGES.get(curve.stage, curve.stage)
    metric = METRICS.get(curve.metric, curve.metric)
    return f"{stage}: {'validation' if curve.split == 'validation' else 'training'} {metric}"


STAGES = {"pretrain": "pretraining", "correct": "correction", "distill": "distillation"}
METRICS = {"loss": "loss", "kl": "KL to the teacher", "forward_kl": "KL to the teacher"}


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
                "points": _thin(list(zip(c.tokens, c.values, strict=True)), CURVE_POINTS),
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


def _thin(points: Sequence[Any], limit: int) -> list[Any]:
    """At most about `limit` of the points, evenly by position, the first and last among them."""
    if len(points) <= limit:
        return list(points)
    step = (len(points) - 1) / (limit - 1)
    return [points[round(i * step)] for i in range(limit)]
