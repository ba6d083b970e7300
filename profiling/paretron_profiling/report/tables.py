"""The tables of a report: every number that its figures show, and what they leave out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from paretron_profiling import figures
from paretron_profiling.compare import SAME_BATCH, SAME_LATENCY, SAME_MEMORY
from paretron_profiling.report.choice import label
from paretron_profiling.report.schema import (
    Check,
    Curve,
    Model,
    Report,
    Speedup,
    loss_above,
    share,
    won_back,
)
from paretron_profiling.report.text import interval_words
from paretron_profiling.schema import FLAGS

TABLE_POINTS = 8

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A table: its caption, column heads, and rows; the first cell of a row is its head."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sizes_table(report: Report) -> Table:
    """Parameters and bytes of every model."""
    rows = tuple(_size_row(m, report.teacher_of(m)) for m in report.models)
    heads = ("Model", "Shape", "Parameters", "Without embeddings", "Weights", "KV cache per token")
    return Table("Sizes", heads, rows)


def _size_row(model: Model, teacher: Model | None) -> tuple[str, ...]:
    """`teacher` is None for a teacher itself."""
    part = share(model.params, None if teacher is None else teacher.params)
    return (
        label(model.name),
        ", ".join(f"{k} {v}" for k, v in model.shape.items()) or figures.ABSENT,
        figures.count(model.params) + ("" if part is None else f" ({figures.percent(part)})"),
        figures.count(model.non_embedding_params),
        figures.size(model.weight_bytes),
        figures.size(model.kv_bytes_per_token),
    )


def losses_table(report: Report) -> Table:
    """Perplexities and losses of every model, beside its teacher's."""
    rows = tuple(
        _loss_row(m, report.teacher_of(m))
        for m in report.models
        if m.loss.final is not None or m.loss.pruned is not None or m.perplexity
    )
    heads = (
        "Model", "Perplexity", "Loss when pruned", "Final loss", "Above teacher, paired",
        "Won back",
    )  # fmt: skip
    return Table("Losses in nats a token, on held-out text", heads, rows)


def _loss_row(model: Model, teacher: Model | None) -> tuple[str, ...]:
    values = list(model.perplexity.items())
    perplexity = (
        figures.plain(values[0][1])
        if len(values) == 1
        else ", ".join(f"{figures.plain(v)} ({k})" for k, v in values)
    )
    text = model.final_text
    return (
        label(model.name),
        perplexity or figures.ABSENT,
        figures.nats(model.loss.pruned),
        figures.nats(model.loss.final)
        + ("" if text is None else figures.within(text.low, text.high)),
        _above_words(model, teacher),
        figures.percent(won_back(model, teacher=teacher)),
    )


def _above_words(model: Model, teacher: Model | None) -> str:
    above = loss_above(model, teacher=teacher)
    name = next((n for n, text in model.texts.items() if text is model.final_text), "")
    paired = model.differences.get(f"loss.{name}")
    if above is None or paired is None:
        return figures.signed_nats(above)
    return figures.signed_nats(above) + figures.within(paired.low, paired.high)


def speed_table(report: Report) -> Table:
    """Every measurement."""
    rows = tuple(
        (
            label(m.name), s.engine, figures.load(s.mode, s.load),
            f"{s.input_len} + {s.output_len}",
            figures.plain(s.output_tok_s), figures.plain(s.prefill_tok_s),
            figures.plain(s.decode_tok_s), figures.plain(s.ttft_ms), figures.plain(s.tpot_ms),
            str(s.repeats), figures.percent(s.spread),
            ", ".join(FLAGS.get(f, f) for f in s.flags) or "none",
        )
        for m in report.models
        for s in m.speed
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Load", "Tokens in + out", "Output tok/s", "Prefill tok/s",
        "Decode tok/s", "TTFT, ms", "TPOT, ms", "Repeats", "Spread", "Doubts",
    )  # fmt: skip
    return Table("All measurements (medians over the repeats)", heads, rows)


def speedup_table(report: Report) -> Table:
    """Every ratio, with its rule and batches."""
    rows = tuple(
        (
            label(s.model), s.engine, RULES[s.rule], f"{s.input_len} + {s.output_len}",
            figures.load(s.mode, s.load) + _LIMITS.get(s.limit or "", ""),
            figures.load(s.mode, s.teacher_load),
            RATIOS.get(s.figure, s.figure), figures.times(s.ratio), interval_words(s),
            _parts_words(s),
        )
        for s in report.speedup
    )  # fmt: skip
    heads = (
        "Model", "Engine", "Rule", "Tokens in + out", "Load", "Teacher's load", "Ratio of",
        "Speed-up", "Interval", "Other figures",
    )  # fmt: skip
    return Table("Speed-up over the teacher; above 1 the student is faster", heads, rows)


def _parts_words(speedup: Speedup) -> str:
    said = (
        f"{RATIOS.get(name, name)} {figures.times(part.ratio)}"
        for name, part in speedup.parts.items()
    )
    return ", ".join(said) or figures.ABSENT


RULES = {SAME_BATCH: "same batch", SAME_MEMORY: "same memory", SAME_LATENCY: "same latency"}
_LIMITS = {"cap": " (capped)", "refused": " (the engine took no more)", "highest": " (the highest)"}
RATIOS = {
    "output_tok_s": "output tokens/s", "prefill_tok_s": "prefill", "decode_tok_s": "decode",
    "ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E latency",
    "request_s": "requests/s",
}  # fmt: skip


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
