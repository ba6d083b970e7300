"""What one measurement is: a workload, its raw samples, and the figures that follow from them.

Definitions, the same for every engine. A sample is one run of a workload: one batch of requests, or
one closed or open loop of them. Times of a sample count from its beginning. Of a request:
 - TTFT: from sending it until the engine hands over its first token;
 - TPOT: (end - first token) / (output tokens - 1);
 - ITL: the times between successive chunks of tokens, of all requests together;
 - E2E: from sending it until its last token.
Of a sample:
 - output tokens/s: output tokens of the completed requests / the time until the last of them ended;
 - prefill tokens/s: batch * input_len / (the last request's TTFT), of a batch alone;
 - decode tokens/s: tokens / time, of what comes after the last request's TTFT, likewise (of those
   that had begun before, a share of their tokens as of their time);
 - a latency: the median over its requests.
A measurement's figure is the median over its samples of the sample's figure, its interval holds the
true median with the stated `coverage`, and its percentiles are of all requests of all samples
together. Its spread is (max - min) / median of output tokens/s, of an open loop, whose rate is
given, of E2E. Goodput is the completed requests a second whose TTFT and TPOT both meet the SLO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from paretron.recipe import Slo
from paretron_profiling.stats import median_interval, percentiles, relative_spread

MIN_REPEATS = 3
MAX_SPREAD = 0.05
MIN_SECONDS = 1.0

OFFLINE, CLOSED, OPEN = "offline", "closed", "open"
MODES: Mapping[str, str] = {
    OFFLINE: "requests sent at once",
    CLOSED: "requests in flight, each followed by the next",
    OPEN: "requests a second, arriving at random",
}

FEW_REPEATS = "few_repeats"
NO_WARMUP = "no_warmup"
NOISY = "noisy"
FAILURES = "failures"
SHORT = "short"
BUSY = "busy"
GPU_SHARED = "gpu_shared"
THROTTLED = "throttled"
VARIED = "varied"
BUNDLED = "bundled"
FLAGS: Mapping[str, str] = {
    FEW_REPEATS: f"fewer than {MIN_REPEATS} repeats",
    NO_WARMUP: "no warm-up",
    NOISY: f"repeats differ by more than {MAX_SPREAD:.0%}",
    FAILURES: "requests failed",
    SHORT: f"measured for less than {MIN_SECONDS:g} s, or than was asked for, in all",
    BUSY: "more was running than the machine has cores, when it began",
    GPU_SHARED: "another process was on the GPU",
    THROTTLED: "the GPU lowered its clocks",
    VARIED: "requests differ in length",
    BUNDLED: "tokens were read in bundles, not one by one",
}


@dataclass(frozen=True)
class Workload:
    """Requests of exact prompt length, each answered with output_len tokens, under a load.

    `load` is the number of requests sent at once (OFFLINE), kept in flight (CLOSED), or arriving a
    second (OPEN).
    """

    engine: str
    mode: str
    load: float
    input_len: int
    output_len: int

    @classmethod
    def at_once(cls, engine: str, size: int, input_len: int, output_len: int) -> Workload:
        """So many requests sent at once."""
        return cls(engine, OFFLINE, size, input_len, output_len)


@dataclass(frozen=True)
class GpuReading:
    """What the GPUs drew while a sample ran, all of them together; the clock is their mean."""

    power_w: float
    energy_j: float
    sm_clock_mhz: float


@dataclass(frozen=True)
class Sample:
    """The raw times of one run of a workload, in seconds since it began.

    sent_s, first_token_s and finish_s have one entry a completed request, in the same order;
    gaps_s holds the times between successive chunks of tokens (of a batch that an engine steps:
    the duration of each step, the prefill left out). failures says why requests were not answered,
    doubts (keys of FLAGS) what was seen beside it. tokens [request][output_len] are what was
    generated; they are not part of the JSON form.
    """

    sent_s: tuple[float, ...]
    first_token_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    failures: tuple[str, ...] = ()
    gpu: GpuReading | None = None
    doubts: tuple[str, ...] = ()
    tokens: tuple[tuple[int, ...], ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def in_lockstep(cls, times_s: Sequence[float], *, tokens: Sequence[Sequence[int]]) -> Sample:
        """The sample of an engine that gives every request its k-th token at times_s[k]."""
        batch = len(tokens)
        return cls(
            (0.0,) * batch,
            (times_s[0],) * batch,
            (times_s[-1],) * batch,
            tuple(b - a for a, b in pairwise(times_s)),
            tokens=tuple(map(tuple, tokens)),
        )

    @property
    def completed(self) -> int:
        """Requests that were answered in full."""
        return len(self.finish_s)

    @property
    def total_s(self) -> float:
        """Until the last request was complete; NaN where none was."""
        return max(self.finish_s, default=math.nan)

    @property
    def prefill_s(self) -> float:
        """Until the last request of a batch had its first token; NaN where none had."""
        return max(self.first_token_s, default=math.nan)

    def ttfts_ms(self, _work: Workload) -> list[float]:
        """Time to first token of every request."""
        return [1e3 * (t - s) for s, t in zip(self.sent_s, self.first_token_s, strict=True)]

    def tpots_ms(self, work: Workload) -> list[float]:
        """Time per output token of every request; none where only one token is asked for."""
        after = work.output_len - 1
        pairs = zip(self.first_token_s, self.finish_s, strict=True)
        return [1e3 * (end - first) / after for first, end in pairs] if after else []

    def itls_ms(self, _work: Workload) -> list[float]:
        """Times between successive chunks, of all requests together."""
        return [1e3 * gap for gap in self.gaps_s]

    def e2es_ms(self, _work: Workload) -> list[float]:
        """From sending to the end, of every request."""
        return [1e3 * (end - s) for s, end in zip(self.sent_s, self.finish_s, strict=True)]

    def output_tok_s(self, work: Workload) -> float | None:
        """Output tokens a second, prefill included."""
        return self.completed * work.output_len / self.total_s if self.completed else None

    def request_s(self, _work: Workload) -> float | None:
        """Completed requests a second."""
        return self.completed / self.total_s if self.completed else None

    def prefill_tok_s(self, work: Workload) -> float | None:
        """Prompt tokens a second until the whole batch had its first token; None of a loop."""
        if work.mode != OFFLINE or not self.completed:
            return None
        return self.completed * work.input_len / self.prefill_s

    def decode_tok_s(self, work: Workload) -> float | None:
        """Output tokens a second once all have their first; None of a loop, or of one token."""
        begin = self.prefill_s
        if work.mode != OFFLINE or not self.total_s > begin:
            return None
        spans = zip(self.first_token_s, self.finish_s, strict=True)
        whole = sum(max(0.0, end - begin) / (end - first) for first, end in spans if end > first)
        return whole * (work.output_len - 1) / (self.total_s - begin)

    def power_w(self, _work: Workload) -> float | None:
        """What the GPUs drew on average."""
        return self.gpu.power_w if self.gpu else None

    def energy_j_tok(self, work: Workload) -> float | None:
        """What the GPUs drew for one output token."""
        tokens = self.completed * work.output_len
        return self.gpu.energy_j / tokens if self.gpu and tokens else None

    def sm_clock_mhz(self, _work: Workload) -> float | None:
        """The clock of the GPUs' multiprocessors."""
        return self.gpu.sm_clock_mhz if self.gpu else None

    def good(self, work: Workload, *, slo: Slo) -> int:
        """Completed requests whose time to first token and per further one both meet the SLO."""
        tpots = self.tpots_ms(work) or [0.0] * self.completed
        return sum(
            ttft <= slo.ttft_ms and tpot <= slo.tpot_ms
            for ttft, tpot in zip(self.ttfts_ms(work), tpots, strict=True)
        )

    def to_json(self) -> dict[str, Any]:
        """The times, without the tokens."""
        out = asdict(self)
        del out["tokens"]
        return jsonable(out)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sample:
        """The inverse of to_json."""
        sent, first, finish, gaps = (
            tuple(data[k]) for k in ("sent_s", "first_token_s", "finish_s", "gaps_s")
        )
        gpu = GpuReading(**data["gpu"]) if data.get("gpu") else None
        doubts = tuple(data.get("doubts", ()))
        return cls(sent, first, finish, gaps, tuple(data["failures"]), gpu, doubts)


LATENCIES: Mapping[str, Callable[[Sample, Workload], list[float]]] = {
    "ttft_ms": Sample.ttfts_ms,
    "tpot_ms": Sample.tpots_ms,
    "itl_ms": Sample.itls_ms,
    "e2e_ms": Sample.e2es_ms,
}


def _median_of(
    latency: Callable[[Sample, Workload], list[float]],
) -> Callable[[Sample, Workload], float | None]:
    def figure(sample: Sample, work: Workload) -> float | None:
        values = latency(sample, work)
        return median(values) if values else None

    return figure


FIGURES: Mapping[str, Callable[[Sample, Workload], float | None]] = {
    "output_tok_s": Sample.output_tok_s,
    "request_s": Sample.request_s,
    "prefill_tok_s": Sample.prefill_tok_s,
    "decode_tok_s": Sample.decode_tok_s,
    **{name: _median_of(latency) for name, latency in LATENCIES.items()},
    "power_w": Sample.power_w,
    "energy_j_tok": Sample.energy_j_tok,
    "sm_clock_mhz": Sample.sm_clock_mhz,
}


@dataclass(frozen=True)
class Measurement:
    """One model under one workload: medians over the repeats, what surrounds them, and the samples.

    `ranges` and `intervals` are (low, high) by figure; an interval holds the true median with at
    least `coverage`. `percentiles` are by latency, then "p50" to "p99". `requests` were sent in all
    samples, `failed` of them were not answered, `good_share` of them met the SLO.
    """

    engine: str
    mode: str
    load: float
    input_len: int
    output_len: int
    output_tok_s: float | None
    request_s: float | None
    prefill_tok_s: float | None
    decode_tok_s: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    itl_ms: float | None
    e2e_ms: float | None
    repeats: int
    spread: float | None
    ranges: Mapping[str, tuple[float, float]]
    flags: tuple[str, ...]
    failed: int = 0
    requests: int = 0
    measured_s: float = 0.0
    power_w: float | None = None
    energy_j_tok: float | None = None
    sm_clock_mhz: float | None = None
    goodput_s: float | None = None
    good_share: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    coverage: float | None = None
    percentiles: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        work: Workload,
        *,
        samples: Sequence[Sample],
        warmup: int,
        slo: Slo | None = None,
        min_seconds: float = 0.0,
        doubts: Sequence[str] = (),
    ) -> Measurement:
        """Condense the samples of a workload; at least one sample is needed.

        `doubts` are flags of the whole run.
        """
        values = {
            name: _finite(figure(s, work) for s in samples) for name, figure in FIGURES.items()
        }
        pooled = {n: _finite(v for s in samples for v in f(s, work)) for n, f in LATENCIES.items()}
        good = [s.good(work, slo=slo or Slo()) for s in samples]
        goodput = _finite(g / s.total_s for g, s in zip(good, samples, strict=True))
        spread = relative_spread(values["e2e_ms" if work.mode == OPEN else "output_tok_s"])
        failed = sum(len(s.failures) for s in samples)
        requests = failed + sum(s.completed for s in samples)
        measured_s = sum(_finite(s.total_s for s in samples))
        figures: dict[str, Any] = {name: median(v) if v else None for name, v in values.items()}
        seen = {*doubts, *(d for s in samples for d in s.doubts)}
        if measured_s < max(min_seconds, MIN_SECONDS):
            seen.add(SHORT)
        stated = {n: median_interval(v) for n, v in (values | {"goodput_s": goodput}).items() if v}
        return cls(
            **asdict(work),
            **figures,
            repeats=len(samples),
            spread=spread,
            ranges={name: (min(v), max(v)) for name, v in values.items() if v},
            flags=flags_of(
                repeats=len(samples), warmup=warmup, spread=spread, failed=failed, seen=seen
            ),
            failed=failed,
            requests=requests,
            measured_s=measured_s,
            goodput_s=median(goodput) if goodput else None,
            good_share=sum(good) / requests if requests else None,
            intervals={name: (i.low, i.high) for name, i in stated.items()},
            coverage=min((i.coverage for i in stated.values()), default=None),
            percentiles={name: percentiles(values) for name, values in pooled.items() if values},
            samples=tuple(samples),
        )

    @property
    def workload(self) -> Workload:
        """What was measured."""
        return Workload(self.engine, self.mode, self.load, self.input_len, self.output_len)

    def summary(self) -> dict[str, Any]:
        """Everything but the raw samples, as JSON; what a report shows."""
        return {k: v for k, v in self.to_json().items() if k != "samples"}

    def to_json(self) -> dict[str, Any]:
        """The JSON form; a figure that is not finite is null."""
        out = {k: getattr(self, k) for k in self.__dataclass_fields__ if k != "samples"}
        return jsonable(out | {"samples": [s.to_json() for s in self.samples]})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of to_json and of summary; what a file does not have yet is empty.

        An unknown key, or no figures, raise TypeError.
        """
        fields = dict(data)
        for name in ("ranges", "intervals"):
            fields[name] = {k: (v[0], v[1]) for k, v in fields.get(name, {}).items()}
        fields["flags"] = tuple(fields["flags"])
        fields["samples"] = tuple(Sample.from_json(s) for s in fields.get("samples", ()))
        return cls(**fields)


def flags_of(
    *,
    repeats: int,
    warmup: int,
    spread: float | None,
    failed: int = 0,
    seen: Collection[str] = (),
) -> tuple[str, ...]:
    """What makes a measurement doubtful, as keys of FLAGS; `seen` are those found elsewhere."""
    found = {
        FEW_REPEATS: repeats < MIN_REPEATS,
        NO_WARMUP: warmup < 1,
        NOISY: spread is not None and spread > MAX_SPREAD,
        FAILURES: failed > 0,
    }
    return tuple(name for name in FLAGS if found.get(name, name in seen))


def jsonable(value: Any) -> Any:
    """The value with tuples as lists, and every number that is not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    return value


def _finite(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None and math.isfinite(v)]
