"""The content of report.json, schema 1.

Losses are in nats a token. A figure that was not measured is null; none is ever NaN.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from paretron_profiling.compare import SAME_BATCH, SAME_MEMORY
from paretron_profiling.models import TEACHER
from paretron_profiling.report.parts import (
    Cost,
    Difference,
    Goal,
    Importance,
    Number,
    Part,
    Peak,
    Raw,
    Roofline,
    Run,
    Task,
    Text,
)
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN, jsonable


class Loss(Part):
    """Validation loss right after pruning, and of the finished model."""

    pruned: Number = None
    final: Number = None


class Speed(Part):
    """One measurement, as `Measurement.summary` writes it."""

    engine: str
    mode: Literal["offline", "closed", "open"]
    load: float
    input_len: int
    output_len: int
    output_tok_s: Number
    request_s: Number = None
    prefill_tok_s: Number
    decode_tok_s: Number = None
    ttft_ms: Number
    tpot_ms: Number
    itl_ms: Number = None
    e2e_ms: Number = None
    repeats: int
    spread: Number
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    flags: tuple[str, ...] = ()
    failed: int = 0
    requests: int = 0
    measured_s: Number = None
    power_w: Number = None
    energy_j_tok: Number = None
    sm_clock_mhz: Number = None
    goodput_s: Number = None
    good_share: Number = None
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    coverage: Number = None
    percentiles: dict[str, dict[str, float]] = Field(default_factory=dict)

    def interval(self, figure: str) -> tuple[float, float] | None:
        """What is stated of a figure's true median: its interval, or the range of the repeats."""
        return self.intervals.get(figure, self.ranges.get(figure))


class Check(Part):
    """One level of an export's parity check: what was measured, and what was allowed."""

    level: str
    about: str
    passed: bool
    measured: dict[str, Number] = Field(default_factory=dict)
    bounds: dict[str, Number] = Field(default_factory=dict)
    worst: str = ""


class Artifact(Part):
    """Something written for a model: what it is for, where, and what was checked."""

    to: str
    path: str
    dtype: str | None = None
    bytes: int | None = None
    checks: tuple[Check, ...] = ()


class Model(Part):
    """One model of the run; `shape` holds sizes by config axis (layers, hidden, ...).

    Sizes are null where only speeds are known. In a report of several runs `run` says of which one
    it is, and `teacher` names the model that it is compared with; `sha256` is its checkpoint's.
    """

    name: str
    kind: str
    params: int | None = None
    non_embedding_params: int | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    shape: dict[str, int] = Field(default_factory=dict)
    loss: Loss = Loss()
    perplexity: dict[str, Number] = Field(default_factory=dict)
    texts: dict[str, Text] = Field(default_factory=dict)
    tasks: dict[str, Task] = Field(default_factory=dict)
    left_out: dict[str, str] = Field(default_factory=dict)
    differences: dict[str, Difference] = Field(default_factory=dict)
    speed: tuple[Speed, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    run: str | None = None
    teacher: str | None = None
    sha256: str | None = None

    @property
    def final_text(self) -> Text | None:
        """The text that the final loss is of, with its interval."""
        return next((t for t in self.texts.values() if t.loss == self.loss.final), None)

    def memory_bytes(self, speed: Speed) -> int | None:
        """Weights and the KV cache of all requests at their full length, as far as known.

        None where requests arrive at random: how many are in flight is not known beforehand.
        """
        if self.weight_bytes is None or self.kv_bytes_per_token is None or speed.mode == OPEN:
            return None
        context = speed.input_len + speed.output_len
        return round(self.weight_bytes + speed.load * context * self.kv_bytes_per_token)


class Ratio(Part):
    """How many times better a student is in one figure."""

    ratio: Number
    interval: tuple[Number, Number]


class Speedup(Part):
    """One ratio of output tokens/s over the teacher's, as `compare.Speedup` writes it."""

    model: str
    engine: str
    rule: Literal["same_batch", "same_memory", "same_latency"]
    ratio: Number
    interval: tuple[Number, Number]
    coverage: float
    pairs: int
    input_len: int
    output_len: int
    mode: Literal["offline", "closed", "open"]
    load: float
    teacher_load: float
    memory_bytes: int | None = None
    limit: Literal["memory", "cap", "refused", "slo", "highest"] | None = None
    flags: tuple[str, ...] = ()
    figure: str = "output_tok_s"  # what the ratio is of
    parts: dict[str, Ratio] = Field(default_factory=dict)


class Curve(Part):
    """One line of a training figure: a value against the tokens seen so far."""

    model: str
    stage: str  # "pretrain", "correct", "distill"
    metric: str  # "loss" or "kl", in nats
    split: Literal["train", "validation"]
    tokens: tuple[int, ...]
    values: tuple[Number, ...]


class Report(Part):
    """A whole report: a teacher, its students, and what was measured; or several runs merged."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    title: str
    stamp: str | None = None  # "TEST" for what `paretron check` writes
    created: str
    seed: int | None = None
    models: tuple[Model, ...]
    speedup: tuple[Speedup, ...] = ()
    curves: tuple[Curve, ...] = ()
    goals: tuple[Goal, ...] = ()
    roofline: Roofline | None = None
    device: dict[str, Any] | None = None  # the probe's numbers, as profile.json has them
    memory: tuple[Peak, ...] = ()
    importance: Importance | None = None
    cost: Cost | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    method: dict[str, Any] = Field(default_factory=dict)
    incomplete: str | None = None
    captions: tuple[str, ...] = ()
    raw: tuple[Raw, ...] = ()
    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, data: Any) -> Report:
        """Check a report's content; numbers that are not finite become null first."""
        return cls.model_validate(jsonable(data))

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return self.model_dump(mode="json", by_alias=True)

    @property
    def teacher(self) -> Model | None:
        """The model that the others are compared with; the first run's, where there are several."""
        return next((m for m in self.models if m.kind == TEACHER), None)

    @property
    def students(self) -> tuple[Model, ...]:
        """All models that are nobody's teacher."""
        return tuple(m for m in self.models if m.kind != TEACHER)

    def model(self, name: str) -> Model | None:
        """The model of this name."""
        return next((m for m in self.models if m.name == name), None)

    def teacher_of(self, model: Model) -> Model | None:
        """The model that this one is compared with; None for a teacher."""
        if model.kind == TEACHER:
            return None
        if model.teacher is not None or self.runs:
            return self.model(str(model.teacher))
        return self.teacher

    def headline_speedup(self, model: str) -> Speedup | None:
        """The ratio that a headline states: same batch, first engine and lengths, largest batch.

        Of the model's own run; where no batch was sent at once, of the most requests in flight.
        """
        same = [s for s in self.speedup if s.rule == SAME_BATCH and self._same_run(s.model, model)]
        by_mode = [[s for s in same if s.mode == mode] for mode in (OFFLINE, CLOSED)]
        found = by_mode[0] or by_mode[1]
        if not found:
            return None
        first = (found[0].engine, found[0].input_len, found[0].output_len)
        load = max(s.load for s in found if (s.engine, s.input_len, s.output_len) == first)
        key = (model, *first, load)
        return next(
            (s for s in found if (s.model, s.engine, s.input_len, s.output_len, s.load) == key),
            None,
        )

    def _same_run(self, one: str, other: str) -> bool:
        found = [self.model(name) for name in (one, other)]
        return len({m.run for m in found if m is not None}) <= 1

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


def share(value: float | None, whole: float | None) -> float | None:
    """A part of a whole; None where either is not known."""
    return None if value is None or not whole else value / whole


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
