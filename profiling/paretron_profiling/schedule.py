"""Which models are measured under which workloads, in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from paretron.errors import Code, Problem
from paretron.recipe import Profile
from paretron_profiling.compare import match_memory
from paretron_profiling.engines.engine import Limits
from paretron_profiling.models import TEACHER, ModelUnderTest
from paretron_profiling.schema import OFFLINE, OPEN, Workload

# Rounds that `min_seconds` may lead to; requests that an open loop may have in flight at most.
MOST_ROUNDS = 100
MOST_IN_FLIGHT = 256


@dataclass(frozen=True)
class Unit:
    """One model under one workload; `matched` where its load follows from the teacher's memory."""

    model: str
    work: Workload
    matched: bool = False

    @property
    def lower(self) -> Unit:
        """The same at three quarters of the load."""
        return replace(self, work=replace(self.work, load=int(self.work.load * 3 / 4)))


@dataclass(frozen=True)
class Cell:
    """What is measured in the same rounds, because its ratios will be taken."""

    units: tuple[Unit, ...]

    def in_round(self, number: int) -> tuple[Unit, ...]:
        """The units in this round's order: forwards, then backwards, and so on.

        A steady drift of the machine then favours no model over two rounds.
        """
        return self.units if number % 2 == 0 else self.units[::-1]

    def of(self, model: str) -> tuple[Unit, ...]:
        """A model's own units."""
        return tuple(u for u in self.units if u.model == model)

    def changed(self, old: Unit, new: Unit | None) -> Cell:
        """The cell with another unit in the place of one, or without it."""
        units = (new if u == old else u for u in self.units)
        return Cell(tuple(u for u in units if u is not None))


def cells(
    engine: str,
    *,
    models: Sequence[ModelUnderTest],
    profile: Profile,
    modes: Collection[str] = (OFFLINE,),
    largest_batch: int | None = None,
) -> Iterator[Cell]:
    """One cell for each pair of lengths and each mode: all models under each load, then those of
    the students that fit in the teacher's memory.

    `modes` are the engine's, `largest_batch` is what it takes at most.
    """
    for input_len, output_len in profile.lengths:
        for mode, loads in profile.loads.items():
            if mode not in modes:
                continue
            works = [Workload(engine, mode, load, input_len, output_len) for load in loads]
            units = [Unit(m.name, work) for work in works for m in models]
            if mode != OPEN:
                units += _matched(models, works[-1], loads, largest_batch)
            yield Cell(tuple(units))


def _matched(
    models: Sequence[ModelUnderTest],
    reference: Workload,
    loads: Collection[float],
    largest_batch: int | None,
) -> Iterator[Unit]:
    """The students in the memory that the teacher takes under the reference load."""
    teacher = next((m for m in models if m.kind == TEACHER), None)
    for student in models if teacher else ():
        if student is teacher or teacher is None:
            continue
        match = match_memory(
            student.facts,
            teacher=teacher.facts,
            reference_batch=int(reference.load),
            context_len=reference.input_len + reference.output_len,
            most=largest_batch,
        )
        if match.batch and match.batch not in loads:
            yield Unit(student.name, replace(reference, load=match.batch), matched=True)


def in_flight(work: Workload, *, profile: Profile) -> int:
    """The most requests that a workload has under way; of an open loop, a bound."""
    if work.mode == OPEN:
        return min(profile.requests_of(work.mode, work.load), MOST_IN_FLIGHT)
    return int(work.load)


def heaviest(units: Sequence[Unit], *, profile: Profile) -> Unit:
    """The unit whose requests hold the most tokens; of those alike, one that was matched."""
    return max(units, key=lambda u: (_tokens(u.work, profile), u.matched))


def _tokens(work: Workload, profile: Profile) -> int:
    return in_flight(work, profile=profile) * (work.input_len + work.output_len)


def limits_of(model: ModelUnderTest, *, plan: Sequence[Cell], profile: Profile) -> Limits:
    """The largest batch, length and KV cache that the plan asks of a model."""
    works = [u.work for cell in plan for u in cell.of(model.name)]
    return Limits(
        batch=max(in_flight(w, profile=profile) for w in works),
        context_len=max(w.input_len + w.output_len for w in works),
        kv_bytes=max(_tokens(w, profile) for w in works) * model.facts.kv_bytes_per_token,
    )


def check_lengths(models: Sequence[ModelUnderTest], *, profile: Profile) -> list[Problem]:
    """The workloads that are longer than a model's context."""
    return [
        Problem(
            Code.RECIPE_VALUE,
            f"{i} + {o} tokens are more than the {m.facts.context_len} that {m.name} can hold",
            where="profile.lengths",
            fix=f"at most {m.facts.context_len} tokens in all",
        )
        for m in models
        for i, o in profile.lengths
        if i + o > m.facts.context_len
    ]
