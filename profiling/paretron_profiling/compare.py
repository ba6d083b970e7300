"""How many times better a student is than its teacher, by three rules that are always named.

same_batch: both under the same load: batch, requests in flight, or requests a second.
same_memory: the teacher at the largest batch (or most requests in flight) of the recipe, its
reference; the student at as many sequences as take, with its weights and KV cache, no more memory
than the teacher's do there. What activations, engine and fragmentation take is left out for both;
an engine that refuses so many is given fewer, and the limit then says so.
same_latency: each at that one of the loads which both were measured under that gave it most output
tokens/s with a median TTFT and TPOT within the SLO; with no such load there is no ratio.

A ratio above 1 is the student's advantage in every figure: speeds are student / teacher, latencies
teacher / student. In an open loop the rate is given to both, so that its ratio is of E2E.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from paretron.recipe import Slo
from paretron_profiling.models import TEACHER, ModelFacts, ModelUnderTest
from paretron_profiling.schema import (
    CLOSED,
    FIGURES,
    LATENCIES,
    OFFLINE,
    OPEN,
    Measurement,
    Workload,
    jsonable,
)
from paretron_profiling.stats import Interval, median_interval, paired_ratios

SAME_BATCH = "same_batch"
SAME_MEMORY = "same_memory"
SAME_LATENCY = "same_latency"

# What a comparison's ratio is of, and what else is compared, by mode.
MAIN: Mapping[str, str] = {OFFLINE: "output_tok_s", CLOSED: "output_tok_s", OPEN: "e2e_ms"}
PARTS: Mapping[str, tuple[str, ...]] = {
    OFFLINE: ("prefill_tok_s", "decode_tok_s"),
    CLOSED: ("ttft_ms", "tpot_ms"),
    OPEN: ("ttft_ms", "tpot_ms"),
}

# A student of small weights and large KV cache savings could run an absurd batch.
LARGEST_BATCH_FACTOR = 8


@dataclass(frozen=True)
class MemoryMatch:
    """A student's batch in its teacher's memory; limit is "memory", or "cap" where that is more
    than 8 x the reference batch or than the engine takes."""

    batch: int
    teacher_batch: int
    memory_bytes: int
    limit: str


def match_memory(
    student: ModelFacts,
    *,
    teacher: ModelFacts,
    reference_batch: int,
    context_len: int,
    most: int | None = None,
) -> MemoryMatch:
    """The student's largest batch in what the teacher takes at its reference batch.

    It is 0 where the student's weights alone take more. `most` is what the engine takes at most.
    """
    budget = teacher.memory_bytes(batch=reference_batch, context_len=context_len)
    per_sequence = context_len * student.kv_bytes_per_token
    fits = max(0, (budget - student.weight_bytes) // per_sequence)
    cap = min(LARGEST_BATCH_FACTOR * reference_batch, most or fits)
    return MemoryMatch(min(fits, cap), reference_batch, budget, "memory" if fits <= cap else "cap")


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, and its interval."""

    ratio: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, found: Interval) -> Ratio:
        """The same without what the interval promises."""
        return cls(found.median, (found.low, found.high))


@dataclass(frozen=True)
class Speedup:
    """One comparison: the median of paired ratios of `figure`, with its interval.

    `parts` are the ratios of other figures of the same runs. `limit` says what bounds the student's
    load: "memory", "cap" or "refused" of same_memory; of same_latency "slo" (for both there is a
    higher load, which is no better or misses the SLO) or "highest" (one of them might be better at
    a higher one).
    """

    model: str
    engine: str
    rule: str
    ratio: float
    interval: tuple[float, float]
    coverage: float
    pairs: int
    input_len: int
    output_len: int
    mode: str
    load: float
    teacher_load: float
    memory_bytes: int | None
    limit: str | None
    flags: tuple[str, ...]
    figure: str = MAIN[OFFLINE]
    parts: Mapping[str, Ratio] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        out: dict[str, Any] = jsonable(asdict(self))
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speedup:
        """The inverse of to_json."""
        fields = dict(data)
        fields["interval"] = tuple(fields["interval"])
        fields["flags"] = tuple(fields["flags"])
        fields["parts"] = {
            name: Ratio(part["ratio"], tuple(part["interval"]))
            for name, part in fields.get("parts", {}).items()
        }
        return cls(**fields)


# What may be compared at all: model, engine, mode, input and output length.
Lane = tuple[str, str, str, int, int]


def lane_of(model: str, measured: Measurement | Workload) -> Lane:
    """The workloads of a model that differ in their load alone."""
    return (model, measured.engine, measured.mode, measured.input_len, measured.output_len)


def speedups(
    measured: Mapping[str, Sequence[Measurement]],
    *,
    models: Sequence[ModelUnderTest],
    largest_batches: Mapping[str, int | None] | None = None,
    slo: Slo | None = None,
    refused: Mapping[Lane, int] | None = None,
) -> tuple[Speedup, ...]:
    """Every comparison that the measurements allow; none when no model is the teacher.

    `largest_batches` holds the most that an engine takes, by its name; `refused` the load that was
    measured where an engine would not run what fits by calculation.

    Measurements of one engine and lengths were taken in the same rounds, so that their samples
    pair by position.
    """
    teacher = next((m for m in models if m.kind == TEACHER), None)
    if teacher is None:
        return ()
    found: list[Speedup | None] = []
    lanes = _lanes(measured.get(teacher.name, ()), teacher.name)
    for student in models:
        if student is teacher:
            continue
        own = _lanes(measured.get(student.name, ()), student.name)
        for lane, bases in lanes.items():
            others = own.get((student.name, *lane[1:]), [])
            found += _same_load(student.name, bases, others)
            most = (largest_batches or {}).get(lane[1])
            found.append(_same_memory(student, teacher, bases, others, most, refused or {}))
            found.append(_same_latency(student.name, bases, others, slo or Slo()))
    return tuple(s for s in found if s is not None)


def _lanes(found: Sequence[Measurement], model: str) -> dict[Lane, list[Measurement]]:
    lanes: dict[Lane, list[Measurement]] = {}
    for one in found:
        lanes.setdefault(lane_of(model, one), []).append(one)
    return lanes


def _same_load(
    model: str, bases: Sequence[Measurement], others: Sequence[Measurement]
) -> Iterator[Speedup | None]:
    for base in bases:
        for other in others:
            if other.load == base.load:
                yield _speedup(model, SAME_BATCH, other, base)


def _same_memory(
    student: ModelUnderTest,
    teacher: ModelUnderTest,
    bases: Sequence[Measurement],
    others: Sequence[Measurement],
    most: int | None,
    refused: Mapping[Lane, int],
) -> Speedup | None:
    """The ratio at the batch that was measured for it; none where that was not reached."""
    base = max(bases, key=lambda m: m.load)
    if base.mode == OPEN:
        return None
    match = match_memory(
        student.facts,
        teacher=teacher.facts,
        reference_batch=int(base.load),
        context_len=base.input_len + base.output_len,
        most=most,
    )
    lower = refused.get(lane_of(student.name, base))
    load, limit = (match.batch, match.limit) if lower is None else (lower, "refused")
    other = next((m for m in others if m.load == load), None)
    if other is None:
        return None
    found = _speedup(student.name, SAME_MEMORY, other, base)
    return found and replace(found, memory_bytes=match.memory_bytes, limit=limit)


def _same_latency(
    model: str, bases: Sequence[Measurement], others: Sequence[Measurement], slo: Slo
) -> Speedup | None:
    """The ratio of the best throughputs within the SLO, of several loads that both were under."""
    both = {m.load for m in bases} & {m.load for m in others}
    within = [[m for m in f if m.load in both and _meets(m, slo)] for f in (bases, others)]
    if not all(within) or len(both) < 2:
        return None
    base, other = (max(found, key=lambda m: m.output_tok_s or 0.0) for found in within)
    found = _speedup(model, SAME_LATENCY, other, base, main=MAIN[OFFLINE])
    ends = max(both) in (other.load, base.load)
    return found and replace(found, parts={}, limit="highest" if ends else "slo")


def _meets(measured: Measurement, slo: Slo) -> bool:
    """Whether the median request is answered in time, and none was left unanswered."""
    ttft, tpot = measured.ttft_ms, measured.tpot_ms
    if measured.failed or ttft is None:
        return False
    return ttft <= slo.ttft_ms and (tpot is None or tpot <= slo.tpot_ms)


def _speedup(
    model: str, rule: str, other: Measurement, base: Measurement, *, main: str | None = None
) -> Speedup | None:
    """The comparison of two measurements; None where no pair of samples has the figure."""
    figure = main or MAIN[base.mode]
    found = _ratio(figure, other, base)
    if found is None:
        return None
    pairs, interval = found
    parts = {name: _ratio(name, other, base) for name in PARTS[base.mode]}
    return Speedup(
        model=model,
        engine=base.engine,
        rule=rule,
        ratio=interval.median,
        interval=(interval.low, interval.high),
        coverage=interval.coverage,
        pairs=pairs,
        input_len=base.input_len,
        output_len=base.output_len,
        mode=base.mode,
        load=other.load,
        teacher_load=base.load,
        memory_bytes=None,
        limit=None,
        flags=tuple(dict.fromkeys((*base.flags, *other.flags))),
        figure=figure,
        parts={name: Ratio.of(part[1]) for name, part in parts.items() if part is not None},
    )


def _ratio(name: str, other: Measurement, base: Measurement) -> tuple[int, Interval] | None:
    """How many pairs there are, and their median: above 1 where the student is better."""
    of = FIGURES[name]
    pairs = [
        (of(a, other.workload), of(b, base.workload))
        for a, b in zip(other.samples, base.samples, strict=False)
    ]
    whole = [(a, b) for a, b in pairs if a and b]
    if not whole:
        return None
    mine, theirs = zip(*whole, strict=True)
    up, down = (theirs, mine) if name in LATENCIES else (mine, theirs)
    return len(whole), median_interval(paired_ratios(up, down))
