"""Which models are measured under which workloads, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paretron.errors import Code, Problem
from paretron.recipe import Profile
from paretron_profiling.compare import match_memory
from paretron_profiling.engines.engine import Limits
from paretron_profiling.models import TEACHER, ModelUnderTest
from paretron_profiling.schema import Workload


@dataclass(frozen=True)
class Unit:
    """One model under one workload."""

    model: str
    work: Workload


@dataclass(frozen=True)
class Cell:
    """What is measured in the same rounds, because its ratios will be taken."""

    units: tuple[Unit, ...]

    def in_round(self, number: int) -> tuple[Unit, ...]:
        """The units in this round's order: forwards, then backwards, and so on.

        A steady drift of the machine then favours no model over two rounds.
        """
        return self.units if number % 2 == 0 else self.units[::-1]


def cells(
    engine: str,
    *,
    models: Sequence[ModelUnderTest],
    profile: Profile,
    largest_batch: int | None = None,
) -> Iterator[Cell]:
    """One cell for each pair of lengths: all models at each batch, then same-memory batches.

    `largest_batch` is what the engine takes at most.
    """
    for input_len, output_len in profile.lengths:
        batches = sorted(set(profile.batches))
        work = {b: Workload(engine, b, input_len, output_len) for b in batches}
        units = [Unit(m.name, work[b]) for b in batches for m in models]
        teacher = next((m for m in models if m.kind == TEACHER), None)
        for student in models if teacher else ():
            if student is teacher or teacher is None:
                continue
            match = match_memory(
                student.facts,
                teacher=teacher.facts,
                reference_batch=batches[-1],
                context_len=input_len + output_len,
                most=largest_batch,
            )
            if match.batch and match.batch not in batches:
                units.append(
                    Unit(student.name, Workload(engine, match.batch, input_len, output_len))
                )
        yield Cell(tuple(units))


def limits_of(model: ModelUnderTest, *, plan: Sequence[Cell]) -> Limits:
    """The largest batch, length and KV cache that the plan asks of a model."""
    works = [u.work for cell in plan for u in cell.units if u.model == model.name]
    per_token = model.facts.kv_bytes_per_token
    return Limits(
        batch=max(w.batch for w in works),
        context_len=max(w.input_len + w.output_len for w in works),
        kv_bytes=max(w.batch * (w.input_len + w.output_len) for w in works) * per_token,
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
