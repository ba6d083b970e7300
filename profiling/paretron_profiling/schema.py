"""What one measurement is: a workload, its raw samples, and the figures that follow from them.

Definitions, the same for every engine. A sample is one batch of requests, all sent at time 0:
 - TTFT of a request: from sending the batch until the engine hands over its first token;
 - TPOT of a request: (end - first token) / (output tokens - 1);
 - prefill tokens/s: batch * input_len / (the last request's TTFT);
 - decode tokens/s: tokens after the first ones / (total - the last request's TTFT);
 - output tokens/s: batch * output_len / total, prefill included.
A measurement's figure is the median over its samples of the sample's figure (a mean over the
batch's requests); its spread is (max - min) / median of output tokens/s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

MIN_REPEATS = 3
MAX_SPREAD = 0.05

FEW_REPEATS = "few_repeats"
NO_WARMUP = "no_warmup"
NOISY = "noisy"
FLAGS: Mapping[str, str] = {
    FEW_REPEATS: f"fewer than {MIN_REPEATS} repeats",
    NO_WARMUP: "no warm-up",
    NOISY: f"repeats differ by more than {MAX_SPREAD:.0%}",
}


@dataclass(frozen=True)
class Workload:
    """One batch of requests of exact prompt length, each answered with output_len tokens."""

    engine: str
    batch: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Sample:
    """The raw times of one batch, in seconds since it was sent.

    first_token_s and finish_s have one entry a request; step_s holds the duration of every step
    in which the engine returned tokens (the first one is, or ends, the prefill).
    tokens [batch][output_len] are what was generated; they are not part of the JSON form.
    """

    first_token_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    step_s: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def in_lockstep(cls, times_s: Sequence[float], *, tokens: Sequence[Sequence[int]]) -> Sample:
        """The sample of an engine that gives every request its k-th token at times_s[k]."""
        steps = (times_s[0], *(b - a for a, b in pairwise(times_s)))
        batch = len(tokens)
        return cls((times_s[0],) * batch, (times_s[-1],) * batch, steps, tuple(map(tuple, tokens)))

    @property
    def prefill_s(self) -> float:
        """Until the last request of the batch had its first token."""
        return max(self.first_token_s)

    @property
    def decode_steps_s(self) -> tuple[float, ...]:
        """The steps after the first one."""
        return self.step_s[1:]

    @property
    def total_s(self) -> float:
        """Until the last request was complete."""
        return max(self.finish_s)

    def output_tok_s(self, work: Workload) -> float:
        """Output tokens a second, prefill included."""
        return work.batch * work.output_len / self.total_s

    def prefill_tok_s(self, work: Workload) -> float:
        """Prompt tokens a second until the whole batch had its first token."""
        return work.batch * work.input_len / self.prefill_s

    def decode_tok_s(self, work: Workload) -> float | None:
        """Output tokens a second after the first ones; None when there is only one."""
        after = self.total_s - self.prefill_s
        return work.batch * (work.output_len - 1) / after if after > 0 else None

    def ttft_ms(self, _work: Workload) -> float:
        """Mean time to first token of the batch's requests."""
        return 1e3 * fmean(self.first_token_s)

    def tpot_ms(self, work: Workload) -> float | None:
        """Mean time per output token of the batch's requests; None when there is only one."""
        if work.output_len < 2:
            return None
        pairs = zip(self.first_token_s, self.finish_s, strict=True)
        return 1e3 * fmean((end - first) / (work.output_len - 1) for first, end in pairs)

    def to_json(self) -> dict[str, Any]:
        """The times, without the tokens."""
        out = asdict(self)
        del out["tokens"]
        return jsonable(out)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of to_json."""
        return cls(*(tuple(data[k]) for k in ("first_token_s", "finish_s", "step_s")))


FIGURES: Mapping[str, Callable[[Sample, Workload], float | None]] = {
    "output_tok_s": Sample.output_tok_s,
    "prefill_tok_s": Sample.prefill_tok_s,
    "decode_tok_s": Sample.decode_tok_s,
    "ttft_ms": Sample.ttft_ms,
    "tpot_ms": Sample.tpot_ms,
}


@dataclass(frozen=True)
class Measurement:
    """One model under one workload: medians over the repeats, their ranges, and the raw samples."""

    engine: str
    batch: int
    input_len: int
    output_len: int
    output_tok_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    repeats: int
    spread: float | None
    ranges: Mapping[str, tuple[float, float]]
    flags: tuple[str, ...]
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, work: Workload, *, samples: Sequence[Sample], warmup: int) -> Measurement:
        """Condense the samples of a workload; at least one sample is needed."""
        values = {
            name: _finite(figure(s, work) for s in samples) for name, figure in FIGURES.items()
        }
        medians = {name: median(v) if v else None for name, v in values.items()}
        spread = relative_spread(values["output_tok_s"])
        return cls(
            engine=work.engine,
            batch=work.batch,
            input_len=work.input_len,
            output_len=work.output_len,
            output_tok_s=medians["output_tok_s"],
            prefill_tok_s=medians["prefill_tok_s"],
            decode_tok_s=medians["decode_tok_s"],
            ttft_ms=medians["ttft_ms"],
            tpot_ms=medians["tpot_ms"],
            repeats=len(samples),
            spread=spread,
            ranges={name: (min(v), max(v)) for name, v in values.items() if v},
            flags=flags_of(repeats=len(samples), warmup=warmup, spread=spread),
            samples=tuple(samples),
        )

    @property
    def workload(self) -> Workload:
        """What was measured."""
        return Workload(self.engine, self.batch, self.input_len, self.output_len)

    def summary(self) -> dict[str, Any]:
        """Everything but the raw samples, as JSON; what a report shows."""
        return {k: v for k, v in self.to_json().items() if k != "samples"}

    def to_json(self) -> dict[str, Any]:
        """The JSON form; a figure that is not finite is null."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "samples"}
        return jsonable(out | {"samples": [s.to_json() for s in self.samples]})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of to_json and of summary; unknown or absent keys raise TypeError."""
        fields = dict(data)
        fields["ranges"] = {k: (v[0], v[1]) for k, v in fields["ranges"].items()}
        fields["flags"] = tuple(fields["flags"])
        fields["samples"] = tuple(Sample.from_json(s) for s in fields.get("samples", ()))
        return cls(**fields)


def flags_of(*, repeats: int, warmup: int, spread: float | None) -> tuple[str, ...]:
    """What makes a measurement doubtful, as keys of FLAGS."""
    found = {
        FEW_REPEATS: repeats < MIN_REPEATS,
        NO_WARMUP: warmup < 1,
        NOISY: spread is not None and spread > MAX_SPREAD,
    }
    return tuple(name for name, holds in found.items() if holds)


def relative_spread(values: Sequence[float]) -> float | None:
    """(max - min) / median; None without values."""
    return (max(values) - min(values)) / median(values) if values else None


def jsonable(value: Any) -> Any:
    """The value with tuples as lists, and every number that is not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return value


def _finite(values: Any) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]
