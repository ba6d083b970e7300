"""The tables of a report: every number that its figures show, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from paretron_profiling import figures
from paretron_profiling.report_schema import Check, Curve, Model, Report, loss_above, won_back
from paretron_profiling.report_text import interval_words
from paretron_profiling.schema import FLAGS

TABLE_POINTS = 8

T = TypeVar("T")


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
            _check_words(a.checks),
        )
        for m in report.models
        for a in m.artifacts
    )  # fmt: skip
    heads = ("Model", "Export", "Folder", "Dtype", "Size", "Checks against the checkpoint")
    return Table("Artifacts", heads, rows)


def _check_words(checks: Sequence[Check]) -> str:
    """Failed checks first, then the passed ones; numbers where there is a bound for them."""
    parts = []
    for head, passed in (("FAILED", False), ("passed", True)):
        if found := [_one_check(c) for c in checks if c.passed is passed]:
            parts.append(f"{head}: {'; '.join(found)}")
    return ". ".join(parts) or "none"


def _one_check(check: Check) -> str:
    shown = [
        f"{name} {_brief(value)}, limit {_brief(check.bounds[name])}"
        for name, value in check.measured.items()
        if check.bounds.get(name) is not None
    ]
    return f"{check.about} ({'; '.join(shown)})" if shown else check.about


def _brief(value: float | None) -> str:
    return figures.ABSENT if value is None else f"{value:.2g}"


def curve_table(report: Report) -> Table:
    """A few points of every curve."""
    rows = tuple(
        (label(c.model), curve_name(c), figures.count(t), figures.nats(v))
        for c in report.curves
        for t, v in thin(list(zip(c.tokens, c.values, strict=True)), TABLE_POINTS)
    )
    return Table("Training, some points", ("Model", "Curve", "Tokens", "Nats"), rows)


def curve_name(curve: Curve) -> str:
    """ "distillation: validation loss" and the like."""
    stage = STAGES.get(curve.stage, curve.stage)
    metric = METRICS.get(curve.metric, curve.metric)
    return f"{stage}: {'validation' if curve.split == 'validation' else 'training'} {metric}"


STAGES = {"pretrain": "pretraining", "correct": "correction", "distill": "distillation"}
METRICS = {"loss": "loss", "kl": "KL to the teacher", "forward_kl": "KL to the teacher"}


def thin(points: Sequence[T], limit: int) -> list[T]:
    """At most about `limit` of the points, evenly by position, the first and last among them."""
    if len(points) <= limit:
        return list(points)
    step = (len(points) - 1) / (limit - 1)
    return [points[round(i * step)] for i in range(limit)]
