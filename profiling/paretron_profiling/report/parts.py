"""Parts of report.json that not every run has: tasks, goals, roofline, cost, importance, runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)] | None


class Part(BaseModel):
    """What all parts share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Text(Part):
    """A held-out text: mean loss in nats a token with its interval, as evaluation.json has it."""

    loss: Number
    perplexity: Number = None
    tokens: int | None = None
    low: Number = None
    high: Number = None
    per: str = "window"


class Task(Part):
    """A task's value, from 0 to 1, with its interval, as evaluation.json has it."""

    metric: str
    value: Number
    stderr: Number = None
    low: Number = None
    high: Number = None
    samples: int | None = None
    few_shot: int | None = None
    higher_is_better: bool = True


class Difference(Part):
    """Student minus teacher on the same documents or windows, taken in pairs."""

    value: Number
    low: Number = None
    high: Number = None
    pairs: int | None = None


class Goal(Part):
    """One goal of the recipe for one student; value, interval and bound share a unit."""

    model: str
    figure: str
    text: str
    bound: Number = None
    value: Number = None
    low: Number = None
    high: Number = None
    verdict: Literal["met", "missed", "undecided", "absent"]


class RooflineRow(Part):
    """The least time that a device needs for a phase, what it took, and what that time is made of.

    `attained` is bound over measured, from 0 to 1; `with_launch_s` adds the cost of launching each
    layer to the bound; `parts` are seconds by weights, KV cache, arithmetic and launches.
    """

    model: str
    engine: str
    mode: str
    load: float
    input_len: int
    output_len: int
    phase: str
    bound_s: Number
    limited_by: str
    measured_s: Number = None
    attained: Number = None
    with_launch_s: Number = None
    parts: dict[str, Number] = Field(default_factory=dict)


class BoundSpeedup(Part):
    """A measured speed-up beside the one that the bounds alone predict."""

    model: str
    engine: str
    rule: str
    mode: str
    load: float
    teacher_load: float
    input_len: int
    output_len: int
    ratio: Number
    predicted: Number = None


class Overhead(Part):
    """What decode steps take beyond their bounds: a constant and so much for each layer, fitted
    over models of different depth; `unexplained_s` is what the line misses at most."""

    engine: str
    mode: str
    load: float
    input_len: int
    output_len: int
    models: int
    per_layer_s: Number = None
    outside_s: Number = None
    unexplained_s: Number = None


class Roofline(Part):
    """Bounds beside measurements, what launches cost by engine, and what was left out."""

    rows: tuple[RooflineRow, ...] = ()
    speedup: tuple[BoundSpeedup, ...] = ()
    overheads: tuple[Overhead, ...] = ()
    launches: dict[str, dict[str, Any]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Peak(Part):
    """The most memory that a model's heaviest workload was seen to take, as profile.json has it.

    `own_process` says whether all of the engine's process counts, or what it added to Paretron's.
    """

    model: str
    engine: str
    mode: str
    load: float
    input_len: int
    output_len: int
    host_bytes: int | None = None
    device_bytes: int | None = None
    own_process: bool


class StageCost(Part):
    """What a stage of the run took: wall time of all attempts, devices at once, tokens trained."""

    stage: str
    kind: str
    seconds: float
    devices: int = 1
    tokens: int | None = None


class Member(Part):
    """A model of the family: FLOPs to train it on a token, tokens from scratch and as made here."""

    model: str
    flops_per_token: float
    scratch_tokens: float
    tokens: float


class Family(Part):
    """The cost of the whole family, every member from scratch, and distilled from the largest.

    `flops` counts tokens trained on alone, as the first Minitron paper does (section 4.1);
    `all_flops` adds what else the run did: the teacher's answers, correction, scoring, evaluation.
    """

    basis: str
    members: tuple[Member, ...]
    scratch_flops: float
    flops: float
    all_flops: float


class Cost(Part):
    """What the run took so far; `device` is what the hours are hours of."""

    device: Literal["GPU", "CPU"]
    stages: tuple[StageCost, ...]
    family: Family | None = None

    @property
    def hours(self) -> float:
        """Device hours of all stages."""
        return sum(s.seconds * s.devices for s in self.stages) / 3600

    @property
    def tokens(self) -> int:
        """Tokens trained on, in all stages together."""
        return sum(s.tokens or 0 for s in self.stages)


class ImportanceAxis(Part):
    """Units of an axis where they were observed: per place the means of equal parts by rank."""

    axis: str
    units: int
    places: tuple[str, ...]
    values: tuple[tuple[Number, ...], ...]


class LayerValues(Part):
    """One value a layer: what is lost without it, by a metric."""

    metric: str
    values: tuple[Number, ...]


class Importance(Part):
    """What mattered in the scored teacher: layers by metric, units of every axis by rank."""

    criterion: str
    samples: int
    tokens: int
    layers: tuple[LayerValues, ...] = ()
    axes: tuple[ImportanceAxis, ...] = ()


class Run(Part):
    """One of the runs that a merged report is made of."""

    name: str
    title: str
    created: str
    teacher_sha256: str | None = None
    hardware: dict[str, Any] = Field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seed: int | None = None


class Raw(Part):
    """Where the raw samples lie, relative to the report, and the sha256 of that file."""

    path: str
    sha256: str | None = None
    run: str | None = None
