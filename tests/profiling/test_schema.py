"""Definitions of the figures, flags, and the JSON forms."""

from __future__ import annotations

import json
import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron_profiling.schema import (
    FEW_REPEATS,
    NO_WARMUP,
    NOISY,
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
    work = Workload(
        "any", draw(st.integers(1, 5)), draw(st.integers(1, 300)), draw(st.integers(2, 6))
    )
    samples = []
    for _ in range(draw(st.integers(1, 6))):
        first = [draw(seconds) for _ in range(work.batch)]
        finish = [f + draw(seconds) for f in first]
        steps = [draw(seconds) for _ in range(work.output_len)]
        samples.append(Sample(tuple(first), tuple(finish), tuple(steps)))
    return work, samples


@given(measured())
def test_figures_follow_their_definitions(case: tuple[Workload, list[Sample]]) -> None:
    work, samples = case
    m = Measurement.of(work, samples=samples, warmup=1)
    totals = [max(s.finish_s) for s in samples]
    assert m.output_tok_s == pytest.approx(median(work.batch * work.output_len / t for t in totals))
    assert m.prefill_tok_s == pytest.approx(
        median(work.batch * work.input_len / max(s.first_token_s) for s in samples)
    )
    assert m.ttft_ms == pytest.approx(
        median(1e3 * sum(s.first_token_s) / work.batch for s in samples)
    )
    assert m.tpot_ms == pytest.approx(
        median(
            1e3
            * sum(
                (e - f) / (work.output_len - 1)
                for f, e in zip(s.first_token_s, s.finish_s, strict=True)
            )
            / work.batch
            for s in samples
        )
    )
    speeds = [work.batch * work.output_len / t for t in totals]
    assert m.spread == pytest.approx((max(speeds) - min(speeds)) / median(speeds))
    assert m.ranges["output_tok_s"] == pytest.approx((min(speeds), max(speeds)))


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
    work = Workload("e", 2, 10, 3)
    assert sample.prefill_s == 0.5
    assert sample.decode_steps_s == pytest.approx((0.1, 0.2))
    assert sample.output_tok_s(work) == pytest.approx(6 / 0.8)
    assert sample.prefill_tok_s(work) == pytest.approx(20 / 0.5)
    assert sample.decode_tok_s(work) == pytest.approx(4 / 0.3)
    assert sample.ttft_ms(work) == pytest.approx(500)
    assert sample.tpot_ms(work) == pytest.approx(150)


def test_a_single_token_has_no_decode() -> None:
    m = Measurement.of(Workload("e", 1, 4, 1), samples=[Sample((0.1,), (0.1,), (0.1,))], warmup=1)
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
        Workload("e", 1, 4, 2), samples=[Sample((math.nan,), (math.nan,), (0.1,))], warmup=1
    )
    text = json.dumps(m.to_json(), allow_nan=False)
    assert m.output_tok_s is None
    assert json.loads(text)["samples"][0]["first_token_s"] == [None]
    assert jsonable({"a": [math.inf, (1.0, -math.inf)]}) == {"a": [None, [1.0, None]]}
