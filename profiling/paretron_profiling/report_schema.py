"""The content of report.json, schema 1.

Losses are in nats a token. A figure that was not measured is null; none is ever NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paretron_profiling.compare import SAME_BATCH, SAME_MEMORY
from paretron_profiling.models import TEACHER
from paretron_profiling.schema import jsonable

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class Part(BaseModel):
    """What all parts share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Loss(Part):
    """Validation loss right after pruning, and of the finished model."""

    pruned: Number = None
    final: Number = None


class Speed(Part):
    """One measurement, as `Measurement.summary` writes it."""

    engine: str
    batch: int
    input_len: int
    output_len: int
    output_tok_s: Number
    prefill_tok_s: Number
    decode_tok_s: Number = None
    ttft_ms: Number
    tpot_ms: Number
    repeats: int
    spread: Number
    ranges: dict[str, tuple[float, float]] = {}
    flags: tuple[str, ...] = ()


class Check(Part):
    """One level of an export's parity check: what was measured, and what was allowed."""

    level: str
    about: str
    passed: bool
    measured: dict[str, Number] = {}
    bounds: dict[str, Number] = {}
    worst: str = ""


class Artifact(Part):
    """Something written for a model: what it is for, where, and what was checked."""

    to: str
    path: str
    dtype: str | None = None
    bytes: int | None = None
    checks: tuple[Check, ...] = ()


class Model(Part):
    """One model of the run; `shape` holds sizes by config axis (layers, hidden, ...)."""

    name: str
    kind: str
    params: int
    non_embedding_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    shape: dict[str, int] = {}
    loss: Loss = Loss()
    perplexity: dict[str, Number] = {}
    speed: tuple[Speed, ...] = ()
    artifacts: tuple[Artifact, ...] = ()


class Speedup(Part):
    """One ratio of output tokens/s over the teacher's, as `compare.Speedup` writes it."""

    model: str
    engine: str
    rule: Literal["same_batch", "same_memory"]
    ratio: Number
    interval: tuple[Number, Number]
    coverage: float
    pairs: int
    input_len: int
    output_len: int
    batch: int
    teacher_batch: int
    memory_bytes: int | None = None
    limit: Literal["memory", "cap"] | None = None
    flags: tuple[str, ...] = ()


class Curve(Part):
    """One line of a training figure: a value against the tokens seen so far."""

    model: str
    stage: str  # "pretrain", "correct", "distill"
    metric: str  # "loss" or "kl", in nats
    split: Literal["train", "validation"]
    tokens: tuple[int, ...]
    values: tuple[Number, ...]


class Report(Part):
    """A whole report: one teacher, its students, and what was measured."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    title: str
    stamp: str | None = None  # "TEST" for what `paretron check` writes
    created: str
    seed: int | None = None
    models: tuple[Model, ...]
    speedup: tuple[Speedup, ...] = ()
    curves: tuple[Curve, ...] = ()
    hardware: dict[str, str | int | float] = {}
    versions: dict[str, str] = {}
    engines: dict[str, dict[str, str]] = {}
    method: dict[str, str | int | float] = {}
    incomplete: str | None = None
    captions: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Any) -> Report:
        """Check a report's content; numbers that are not finite become null first."""
        return cls.model_validate(jsonable(data))

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def teacher(self) -> Model | None:
        """The model that the others are compared with."""
        return next((m for m in self.models if m.kind == TEACHER), None)

    @property
    def students(self) -> tuple[Model, ...]:
        """All models but the teacher."""
        return tuple(m for m in self.models if m.kind != TEACHER)

    def headline_speedup(self, model: str) -> Speedup | None:
        """The ratio that a headline states: same batch, first engine and lengths, largest batch."""
        found = [s for s in self.speedup if s.rule == SAME_BATCH]
        if not found:
            return None
        first = (found[0].engine, found[0].input_len, found[0].output_len)
        batch = max(s.batch for s in found if (s.engine, s.input_len, s.output_len) == first)
        key = (model, *first, batch)
        return next(
            (s for s in found if (s.model, s.engine, s.input_len, s.output_len, s.batch) == key),
            None,
        )

    def memory_speedup(self, model: str) -> Speedup | None:
        """The same-memory ratio on the engine and lengths of the headline."""
        base = self.headline_speedup(model)
        return next(
            (
                s
                for s in self.speedup
                if base is not None
                and s.rule == SAME_MEMORY
                and (s.model, s.engine) == (model, base.engine)
                and (s.input_len, s.output_len) == (base.input_len, base.output_len)
            ),
            None,
        )


def loss_above(model: Model, *, teacher: Model | None) -> float | None:
    """How many nats a model's final loss is above the teacher's."""
    if teacher is None or model.loss.final is None or teacher.loss.final is None:
        return None
    return model.loss.final - teacher.loss.final


def won_back(model: Model, *, teacher: Model | None) -> float | None:
    """The share of the loss that pruning cost which training won back; 1 is the teacher's loss."""
    above = loss_above(model, teacher=teacher)
    if above is None or model.loss.pruned is None or model.loss.final is None:
        return None
    lost = model.loss.pruned - (model.loss.final - above)
    return (model.loss.pruned - model.loss.final) / lost if lost > 0 else None
