"""How many times faster a student is than its teacher, by two rules that are always named.

same_batch: both at the same batch.
same_memory: the teacher at the largest batch of the recipe (its reference batch), the student at
the largest batch whose weights and KV cache take no more memory than the teacher's do there. What
activations, engine and fragmentation take is left out for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from paretron_profiling.models import TEACHER, ModelFacts, ModelUnderTest
from paretron_profiling.schema import Measurement, jsonable
from paretron_profiling.stats import median_interval, paired_ratios

SAME_BATCH = "same_batch"
SAME_MEMORY = "same_memory"

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
class Speedup:
    """The median of paired ratios of output tokens/s, student over teacher, with its interval."""

    model: str
    engine: str
    rule: str
    ratio: float
    interval: tuple[float, float]
    coverage: float
    pairs: int
    input_len: int
    output_len: int
    batch: int
    teacher_batch: int
    memory_bytes: int | None
    limit: str | None
    flags: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        out: dict[str, Any] = jsonable(asdict(self))
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Speedup:
        """The inverse of to_json."""
        low, high = data["interval"]
        return cls(**{**data, "interval": (low, high), "flags": tuple(data["flags"])})


def speedups(
    measured: Mapping[str, Sequence[Measurement]],
    *,
    models: Sequence[ModelUnderTest],
    largest_batches: Mapping[str, int | None] | None = None,
) -> tuple[Speedup, ...]:
    """Every ratio that the measurements allow; none when no model is the teacher.

    `largest_batches` holds the most that an engine takes, by its name.

    Measurements of one engine and lengths were taken in the same rounds, so that their samples
    pair by position.
    """
    teacher = next((m for m in models if m.kind == TEACHER), None)
    if teacher is None:
        return ()
    found: list[Speedup] = []
    for student in models:
        if student is not teacher:
            for base in measured.get(teacher.name, ()):
                found += _against(base, measured.get(student.name, ()), student.name)
            found += _same_memory(student, teacher, measured, largest_batches or {})
    return tuple(found)


def _against(base: Measurement, others: Sequence[Measurement], model: str) -> Iterator[Speedup]:
    for other in others:
        if other.workload == base.workload:
            yield _speedup(model, SAME_BATCH, other, base, None)


def _same_memory(
    student: ModelUnderTest,
    teacher: ModelUnderTest,
    measured: Mapping[str, Sequence[Measurement]],
    largest_batches: Mapping[str, int | None],
) -> Iterator[Speedup]:
    largest: dict[tuple[str, int, int], Measurement] = {}
    for base in measured.get(teacher.name, ()):
        key = (base.engine, base.input_len, base.output_len)
        if key not in largest or base.batch > largest[key].batch:
            largest[key] = base
    for (engine, input_len, output_len), base in largest.items():
        by_batch = {
            m.batch: m
            for m in measured.get(student.name, ())
            if (m.engine, m.input_len, m.output_len) == (engine, input_len, output_len)
        }
        match = match_memory(
            student.facts,
            teacher=teacher.facts,
            reference_batch=base.batch,
            context_len=input_len + output_len,
            most=largest_batches.get(engine),
        )
        if match.batch in by_batch:
            yield _speedup(student.name, SAME_MEMORY, by_batch[match.batch], base, match)


def _speedup(
    model: str, rule: str, other: Measurement, base: Measurement, match: MemoryMatch | None
) -> Speedup:
    pairs = min(len(other.samples), len(base.samples))
    ratios = paired_ratios(
        [s.output_tok_s(other.workload) for s in other.samples[:pairs]],
        [s.output_tok_s(base.workload) for s in base.samples[:pairs]],
    )
    interval = median_interval(ratios)
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
        batch=other.batch,
        teacher_batch=base.batch,
        memory_bytes=match.memory_bytes if match else None,
        limit=match.limit if match else None,
        flags=tuple(dict.fromkeys((*base.flags, *other.flags))),
    )
