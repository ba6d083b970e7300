"""What models could reach on a device that is known by its numbers alone.

Predicted are bounds: the speed that no engine exceeds there, with the launches of an engine where
both their number and their cost are known. Engines attain a part of it, and a ratio of two bounds
is met where they attain the same part of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretron_profiling.compare import LARGEST_BATCH_FACTOR, SAME_BATCH, SAME_MEMORY
from paretron_profiling.models import TEACHER
from paretron_profiling.roofline.bounds import (
    Bound,
    Costs,
    Launches,
    decode_bound,
    mean_context,
    prefill_bound,
)
from paretron_profiling.roofline.devices import Device
from paretron_profiling.schema import jsonable


@dataclass(frozen=True)
class Load:
    """Requests sent at once, and their lengths in tokens."""

    batch: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Prediction:
    """The bounds of a model under a load; memory_bytes are those of weights and full caches."""

    model: str
    load: Load
    prefill: Bound
    decode: Bound
    memory_bytes: float
    fits: bool | None  # None where the device's memory is not known

    @property
    def total_s(self) -> float:
        """Until the last token of the batch."""
        return self.prefill.with_launch_s + (self.load.output_len - 1) * self.decode.with_launch_s

    @property
    def output_tok_s(self) -> float:
        """Output tokens a second, prefill included."""
        return self.load.batch * self.load.output_len / self.total_s

    def as_json(self) -> dict[str, Any]:
        """The stable form of a row of `roofline --json`."""
        return {
            "model": self.model,
            "batch": self.load.batch,
            "input_len": self.load.input_len,
            "output_len": self.load.output_len,
            "prefill": self.prefill.as_json(),
            "decode": self.decode.as_json(),
            "output_tok_s": self.output_tok_s,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
        }


@dataclass(frozen=True)
class PredictedSpeedup:
    """A ratio of output tokens/s, student over teacher, by one of the rules of `compare`."""

    model: str
    rule: str
    student: Prediction
    teacher: Prediction
    limit: str | None = None  # of the same memory: "memory", or "cap" where more would fit

    @property
    def ratio(self) -> float:
        """How many times faster the student's bound is."""
        return self.student.output_tok_s / self.teacher.output_tok_s

    def as_json(self) -> dict[str, Any]:
        """The stable form of a speedup of `roofline --json`."""
        return {
            "model": self.model,
            "rule": self.rule,
            "batch": self.student.load.batch,
            "teacher_batch": self.teacher.load.batch,
            "input_len": self.student.load.input_len,
            "output_len": self.student.load.output_len,
            "ratio": self.ratio,
            "limit": self.limit,
        }


def predict(
    model: str, costs: Costs, device: Device, *, load: Load, launches: Launches | None = None
) -> Prediction:
    """The bounds of one model under one load."""
    memory = costs.memory_bytes(batch=load.batch, context=load.input_len + load.output_len)
    context = mean_context(load.input_len, load.output_len)
    return Prediction(
        model,
        load,
        prefill_bound(costs, device, batch=load.batch, input_len=load.input_len, launches=launches),
        decode_bound(costs, device, batch=load.batch, context=context, launches=launches),
        memory,
        None if device.memory_bytes is None else memory <= device.memory_bytes,
    )


def predicted_speedups(
    models: Mapping[str, Costs],
    device: Device,
    *,
    loads: Sequence[Load],
    launches: Launches | None = None,
) -> Iterator[PredictedSpeedup]:
    """Every student against the model called teacher, at the same batch and in the same memory.

    Same memory: the student's largest batch whose weights and caches take no more than the
    teacher's, up to 8 times the teacher's batch; left out where no batch fits.
    """
    if TEACHER not in models:
        return
    teacher = models[TEACHER]
    for load in loads:
        base = predict(TEACHER, teacher, device, load=load, launches=launches)
        for name, costs in models.items():
            if name == TEACHER:
                continue
            same = predict(name, costs, device, load=load, launches=launches)
            yield PredictedSpeedup(name, SAME_BATCH, same, base)
            batch, limit = same_memory_batch(costs, teacher, load)
            if batch:
                more = Load(batch, load.input_len, load.output_len)
                larger = predict(name, costs, device, load=more, launches=launches)
                yield PredictedSpeedup(name, SAME_MEMORY, larger, base, limit)


def same_memory_batch(student: Costs, teacher: Costs, load: Load) -> tuple[int, str]:
    """The student's largest batch in what its teacher takes under the load, and what limits it.

    0 where the student's weights alone take more.
    """
    context = load.input_len + load.output_len
    budget = teacher.memory_bytes(batch=load.batch, context=context)
    fits = max(0, int((budget - student.weight_bytes) // student.kv_bytes_at(context)))
    most = LARGEST_BATCH_FACTOR * load.batch
    return (fits, "memory") if fits <= most else (most, "cap")


def predictions_json(
    models: Mapping[str, Costs],
    device: Device,
    *,
    loads: Sequence[Load],
    launches: Launches | None = None,
) -> dict[str, Any]:
    """What `roofline --json` prints."""
    rows = [
        predict(name, costs, device, load=load, launches=launches)
        for load in loads
        for name, costs in models.items()
    ]
    ratios = predicted_speedups(models, device, loads=loads, launches=launches)
    out: dict[str, Any] = jsonable(
        {
            "device": device.as_json(),
            "rows": [row.as_json() for row in rows],
            "speedup": [one.as_json() for one in ratios],
        }
    )
    return out
