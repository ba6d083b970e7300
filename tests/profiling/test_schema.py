"""Definitions of the figures, flags, and the JSON forms."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.recipe import Slo
from paretron_profiling.schema import (
    FEW_REPEATS,
    NO_WARMUP,
    NOISY,
    GpuReading,
    Measurement,
    Sample,
    Workload,
    flags_of,
    jsonable,
)

seconds = st.floats(1e-6, 1e3)


@st.composite
def measured(draw: st.DrawFn) -> tuple[Workload, list[Sample]]:
    """A workload and samples whose requests may have different times to first token."""
    work = Workload.at_once(
        "any", draw(st.integers(1, 5)), draw(st.integers(1, 300)), draw(st.integers(2, 6))
    )
    samples = []
    for _ in range(draw(st.integers(1, 6))):
        first = [draw(seconds) for _ in range(int(work.load))]
        finish = [f + draw(seconds) for f in first]
        steps = [draw(seconds) for _ in range(work.output_len)]
        samples.append(Sample((0.0,) * len(first), tuple(first), tuple(finish), tuple(steps)))
    return work, samples


@given(measured())
def test_figures_follow_their_definitions(case: tuple[Workload, list[Sample]]) -> None:
    work, samples = case
    m = Measurement.of(work, samples=samples, warmup=1)
    totals = [max(s.finish_s) for s in samples]
    assert m.output_tok_s == pytest.approx(median(work.load * work.output_len / t for t in totals))
    assert m.prefill_tok_s == pytest.approx(
        median(work.load * work.input_len / max(s.first_token_s) for s in samples)
    )
    assert m.ttft_ms == pytest.approx(median(1e3 * median(s.first_token_s) for s in samples))
    assert m.tpot_ms == pytest.approx(
        median(
            1e3
            * median(
                (e - f) / (work.output_len - 1)
                for f, e in zip(s.first_token_s, s.finish_s, strict=True)
            )
            for s in samples
        )
    )
    speeds = [work.load * work.output_len / t for t in totals]
    assert m.spread == pytest.approx((max(speeds) - min(speeds)) / median(speeds))
    assert m.ranges["output_tok_s"] == pytest.approx((min(speeds), max(speeds)))


@given(measured(), st.floats(1, 1e6), st.floats(1, 1e6))
def test_goodput_and_percentiles(
    case: tuple[Workload, list[Sample]], ttft_ms: float, tpot_ms: float
) -> None:
    work, samples = case
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    m = Measurement.of(work, samples=samples, warmup=1, slo=slo)
    requests = [
        (1e3 * first, 1e3 * (end - first) / (work.output_len - 1))
        for s in samples
        for first, end in zip(s.first_token_s, s.finish_s, strict=True)
    ]
    good = [a <= ttft_ms and b <= tpot_ms for a, b in requests]
    assert m.requests == len(good)
    assert m.good_share == pytest.approx(sum(good) / len(good))
    size = int(work.load)
    counts = [sum(good[k : k + size]) for k in range(0, len(good), size)]
    assert m.goodput_s == pytest.approx(
        median(n / s.total_s for n, s in zip(counts, samples, strict=True))
    )
    for name, values in (
        ("ttft_ms", [a for a, _ in requests]),
        ("tpot_ms", [b for _, b in requests]),
    ):
        expected = np.percentile(values, (50, 90, 95, 99))
        assert list(m.percentiles[name].values()) == pytest.approx(expected)
    assert list(m.percentiles["e2e_ms"]) == ["p50", "p90", "p95", "p99"]


@given(measured())
def test_intervals_hold_the_figures(case: tuple[Workload, list[Sample]]) -> None:
    work, samples = case
    m = Measurement.of(work, samples=samples, warmup=1)
    assert set(m.intervals) == {*m.ranges, "goodput_s"}
    for name, (low, high) in m.intervals.items():
        assert low <= getattr(m, name) <= high
    assert m.coverage == pytest.approx(max(0.0, 1 - 2 / 2 ** len(samples)))


def loop(mode: str, starts: list[float], ends: list[float], failures: int = 0) -> Sample:
    """Requests whose first token comes after 0.1 s."""
    first = tuple(s + 0.1 for s in starts)
    return Sample(tuple(starts), first, tuple(ends), (0.05,) * 4, ("refused",) * failures)


def test_a_loop_is_judged_by_completed_requests() -> None:
    work = Workload("e", "closed", 2, 10, 3)
    sample = loop("closed", [0.0, 0.0, 0.5, 0.6], [0.5, 0.6, 1.0, 2.0], failures=1)
    m = Measurement.of(work, samples=[sample] * 3, warmup=1, slo=Slo(ttft_ms=150, tpot_ms=250))
    assert m.output_tok_s == pytest.approx(4 * 3 / 2.0)
    assert m.request_s == pytest.approx(4 / 2.0)
    assert m.prefill_tok_s is m.decode_tok_s is None
    assert m.ttft_ms == pytest.approx(100)
    assert m.e2e_ms == pytest.approx(1e3 * (0.5 + 0.6) / 2)
    # TPOT: 0.2, 0.25, 0.2 and 0.65 s a token; the failed request was not good either.
    assert m.goodput_s == pytest.approx(3 / 2.0)
    assert m.good_share == pytest.approx(3 / 5)
    assert (m.requests, m.failed, m.flags) == (15, 3, ("failures",))


def test_the_spread_of_an_open_loop_is_of_latency() -> None:
    samples = [loop("open", [0.0, 1.0], [0.5 + d, 1.5 + d]) for d in (0.0, 0.0, 0.1)]
    closed, opened = (
        Measurement.of(Workload("e", mode, 1, 10, 3), samples=samples, warmup=1)
        for mode in ("closed", "open")
    )
    assert closed.spread == pytest.approx(1 - 1.5 / 1.6)
    assert opened.spread == pytest.approx(0.1 / 0.5)


def test_what_a_gpu_drew() -> None:
    work = Workload.at_once("e", 2, 4, 5)
    plain = Sample.in_lockstep([0.1] * 5, tokens=[[0] * 5] * 2)
    samples = [replace(plain, gpu=GpuReading(w, 2 * w, 1500.0)) for w in (300.0, 310.0, 350.0)]
    samples[1] = replace(samples[1], doubts=("throttled",))
    m = Measurement.of(work, samples=samples, warmup=1)
    assert (m.power_w, m.sm_clock_mhz) == (310.0, 1500.0)
    assert m.energy_j_tok == pytest.approx(620 / 10)
    assert "throttled" in m.flags
    again = Measurement.from_json(json.loads(json.dumps(m.to_json(), allow_nan=False)))
    assert again == m
    bare = Measurement.of(work, samples=[plain], warmup=1)
    assert bare.power_w is bare.energy_j_tok is bare.sm_clock_mhz is None


def test_what_was_too_short_or_busy_is_flagged() -> None:
    def flags(seconds: float, **given: Any) -> tuple[str, ...]:
        sample = Sample.in_lockstep([seconds / 2, seconds], tokens=[[0, 0]])
        work = Workload.at_once("e", 1, 4, 2)
        return Measurement.of(work, samples=[sample] * 3, warmup=1, **given).flags

    assert flags(0.4) == ()
    assert flags(0.3) == ("short",)
    assert flags(0.4, min_seconds=2) == ("short",)
    assert flags(0.4, doubts=["busy"]) == ("busy",)


def test_a_file_from_before_the_newer_figures() -> None:
    m = Measurement.of(
        Workload.at_once("e", 1, 4, 2),
        samples=[Sample((0.0,), (0.1,), (0.2,), (0.1,))],
        warmup=1,
    )
    newer = {
        "requests", "measured_s", "power_w", "energy_j_tok", "sm_clock_mhz", "goodput_s",
        "good_share", "intervals", "coverage", "percentiles",
    }  # fmt: skip
    older = {k: v for k, v in m.to_json().items() if k not in newer}
    for sample in older["samples"]:
        del sample["gpu"], sample["doubts"]
    again = Measurement.from_json(older)
    assert again.output_tok_s == m.output_tok_s
    assert (again.intervals, again.percentiles) == ({}, {})
    with pytest.raises(TypeError, match="colour"):
        Measurement.from_json(m.to_json() | {"colour": "red"})


@given(measured())
def test_json_and_back(case: tuple[Workload, list[Sample]]) -> None:
    work, samples = case
    m = Measurement.of(work, samples=samples, warmup=1)
    text = json.dumps(m.to_json(), allow_nan=False)
    assert Measurement.from_json(json.loads(text)) == m
    assert "samples" not in m.summary()
    assert m.workload == work


def test_lockstep_sample() -> None:
    sample = Sample.in_lockstep([0.5, 0.6, 0.8], tokens=[[1, 2, 3], [4, 5, 6]])
    work = Workload.at_once("e", 2, 10, 3)
    assert sample.prefill_s == 0.5
    assert sample.gaps_s == pytest.approx((0.1, 0.2))
    assert sample.output_tok_s(work) == pytest.approx(6 / 0.8)
    assert sample.prefill_tok_s(work) == pytest.approx(20 / 0.5)
    assert sample.decode_tok_s(work) == pytest.approx(4 / 0.3)
    assert sample.ttfts_ms(work) == pytest.approx([500] * 2)
    assert sample.tpots_ms(work) == pytest.approx([150] * 2)


def test_tokens_decoded_while_others_are_in_prefill_do_not_count() -> None:
    """Of the first request's 4 s of decoding 2 come after the last prefill: 10 of its 20 tokens."""
    work = Workload.at_once("e", 2, 10, 21)
    sample = Sample((0.0, 0.0), (1.0, 3.0), (5.0, 5.0), ())
    assert sample.decode_tok_s(work) == pytest.approx((10 + 20) / 2)
    done_before = Sample((0.0, 0.0), (1.0, 3.0), (2.0, 5.0), ())
    assert done_before.decode_tok_s(work) == pytest.approx(20 / 2)


def test_a_single_token_has_no_decode() -> None:
    sample = Sample((0.0,), (0.1,), (0.1,), ())
    m = Measurement.of(Workload.at_once("e", 1, 4, 1), samples=[sample], warmup=1)
    assert m.tpot_ms is None
    assert m.decode_tok_s is None
    assert "decode_tok_s" not in m.ranges


@pytest.mark.parametrize(
    ("repeats", "warmup", "spread", "expected"),
    [
        (3, 1, 0.05, ()),
        (2, 1, 0.05, (FEW_REPEATS,)),
        (3, 0, 0.05, (NO_WARMUP,)),
        (3, 1, 0.0501, (NOISY,)),
        (1, 0, 0.2, (FEW_REPEATS, NO_WARMUP, NOISY)),
        (3, 1, None, ()),
    ],
)
def test_flags(repeats: int, warmup: int, spread: float | None, expected: tuple[str, ...]) -> None:
    assert flags_of(repeats=repeats, warmup=warmup, spread=spread) == expected


def test_nothing_that_is_not_finite_is_written() -> None:
    m = Measurement.of(
        Workload.at_once("e", 1, 4, 2),
        samples=[Sample((0.0,), (math.nan,), (math.nan,), (0.1,))],
        warmup=1,
    )
    text = json.dumps(m.to_json(), allow_nan=False)
    assert m.output_tok_s is None
    assert json.loads(text)["samples"][0]["first_token_s"] == [None]
    assert jsonable({"a": [math.inf, (1.0, -math.inf)]}) == {"a": [None, [1.0, None]]}
