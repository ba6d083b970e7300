"""A goal is judged by an interval, and never met where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron_profiling.compare import speedups
from paretron_profiling.goals import judged, require, said
from paretron_profiling.models import ModelFacts, ModelUnderTest
from paretron_profiling.result import ProfileResult
from paretron_profiling.schema import CLOSED, Measurement, Sample, Workload

LENGTHS = (16, 9)
MODELS = [
    {"name": "teacher", "kind": "teacher", "params": 1000, "weight_bytes": 4000},
    {"name": "width", "kind": "width", "params": 500, "weight_bytes": 2000},
]
FACTS = {"teacher": ModelFacts(320, 4000, 10, 512), "width": ModelFacts(320, 2000, 10, 512)}
# Engine, batch -> seconds of each round, for a batch to be done; its first token takes a tenth.
TIMES: dict[str, dict[tuple[str, int], tuple[float, ...]]] = {
    "teacher": {("a", 1): (2.0, 2.0, 2.0), ("a", 8): (4.0, 4.4, 4.2), ("b", 8): (3.0, 3.0, 3.0)},
    "width": {
        ("a", 1): (1.0, 1.0, 1.0),
        ("a", 8): (2.0, 2.0, 2.2),  # 2.0, 2.2 and 1.909 times as fast
        ("a", 16): (3.0, 3.0, 3.0),  # in the memory of the teacher's batch of 8
        ("b", 8): (2.0, 2.0, 2.0),
    },
}


def measured(
    engine: str, load: int, times: Sequence[float], *, mode: str = "offline"
) -> Measurement:
    samples = []
    for total in times:
        steps = [total / 10 + k * total * 0.9 / (LENGTHS[1] - 1) for k in range(LENGTHS[1])]
        samples.append(Sample.in_lockstep(steps, tokens=[[0] * LENGTHS[1]] * load))
    return Measurement.of(Workload(engine, mode, load, *LENGTHS), samples=samples, warmup=1)


def profile(times: Any = TIMES, *, loops: Any = ()) -> dict[str, Any]:
    """profile.json of made-up times."""
    found = {
        name: tuple(measured(engine, load, t) for (engine, load), t in rows.items())
        + tuple(measured("a", load, seconds[name], mode=CLOSED) for load, seconds in loops)
        for name, rows in times.items()
    }
    models = [ModelUnderTest(n, n, {}, FACTS[n]) for n in found]
    ratios = speedups(found, models=models)
    return ProfileResult(found, ratios, {}, {}, {}).to_json()


def text(loss: float | None, half: float | None) -> dict[str, Any]:
    low, high = (None, None) if loss is None or half is None else (loss - half, loss + half)
    return {"loss": loss, "perplexity": None, "tokens": 9, "low": low, "high": high}


def task(value: float, half: float) -> dict[str, Any]:
    return {"metric": "acc", "value": value, "low": value - half, "high": value + half}


EVALUATIONS = {
    "teacher": {"texts": {"validation": text(3.0, 0.02)}, "tasks": {"a": task(0.60, 0.02)}},
    "width": {"texts": {"validation": text(3.1, 0.02)}, "tasks": {"a": task(0.58, 0.02)}},
}


def verdict(key: str, bound: str, **given: Any) -> dict[str, Any]:
    inputs = {"profile": profile(), "evaluations": EVALUATIONS, "differences": {}} | given
    (found,) = judged({key: bound}, models=MODELS, **inputs)
    assert set(found) == {
        "model", "figure", "text", "bound", "value", "low", "high", "verdict",
    }  # fmt: skip
    assert (found["model"], found["figure"]) == ("width", key)
    assert said(found).startswith(f"width: {key} at ")
    return found


@pytest.mark.parametrize(
    ("key", "bound", "expected", "value"),
    [
        # The headline's workload: the first engine, the largest batch of the teacher.
        ("output_tok_s", ">= 1.9x", "met", 2.0),
        ("output_tok_s", ">= 2.0x", "undecided", 2.0),
        ("output_tok_s", ">= 2.3x", "missed", 2.0),
        ("output_tok_s", "<= 1.9x", "missed", 2.0),
        ("output_tok_s", "<= 2.2x", "met", 2.0),
        ("output_tok_s@b", ">= 1.5x", "met", 1.5),
        ("output_tok_s@batch:1", ">= 2x", "met", 2.0),
        ("output_tok_s@same_memory", ">= 2.6x", "met", 2.8),
        ("output_tok_s", ">= 30", "met", 36.0),
        ("output_tok_s", ">= +16", "undecided", 18.0),
        ("ttft_ms", "<= 221", "met", 200.0),
        ("ttft_ms", "<= 200", "undecided", 200.0),
        ("ttft_ms", "<= 0.5x", "undecided", 0.5),
        ("ttft_ms@same_memory", "<= 300", "met", 300.0),
        ("params", "<= 0.5x", "met", 0.5),
        ("params", "<= 499", "missed", 500.0),
        ("weight_bytes", "<= -2000", "met", -2000.0),
        ("loss.validation", "<= 3.1", "undecided", 3.1),
        ("loss.validation", "<= 3.13", "met", 3.1),
        ("perplexity.validation", "<= 20", "missed", math.exp(3.1)),
        ("task.a", ">= 50", "met", 58.0),
        ("task.a", ">= 61", "missed", 58.0),
    ],
)
def test_a_verdict(key: str, bound: str, expected: str, value: float) -> None:
    found = verdict(key, bound)
    assert (found["verdict"], found["value"]) == (expected, pytest.approx(value)), found
    assert found["low"] <= found["value"] <= found["high"]


def test_a_speedup_is_the_headlines_own() -> None:
    content = profile()
    stated = next(
        s for s in content["speedup"]
        if (s["rule"], s["engine"], s["load"], s["teacher_load"]) == ("same_batch", "a", 8, 8)
    )  # fmt: skip
    found = verdict("output_tok_s", ">= 1.8x", profile=content)
    assert [found["low"], found["high"]] == stated["interval"]
    assert found["value"] == stated["ratio"]
    assert "a, 8 requests sent at once, 16 + 9 tokens" in found["text"]
    assert "3 repeats, interval of 75%" in found["text"]
    assert "repeats differ by more than 5%" in found["text"]


def test_a_loop_is_spoken_of_where_it_is_named_or_alone() -> None:
    loop = (4, {"teacher": (1.0, 1.0, 1.0), "width": (0.5, 0.5, 0.5)})
    content = profile(loops=[loop])
    assert "sent at once" in verdict("e2e_ms", "<= 1", profile=content)["text"]
    named = verdict("e2e_ms@concurrency:4", "<= 500", profile=content)
    assert (named["verdict"], named["value"]) == ("met", pytest.approx(500))
    assert "4 requests in flight" in named["text"]
    alone = verdict("e2e_ms", "<= 1", profile=profile({"teacher": {}, "width": {}}, loops=[loop]))
    assert (alone["verdict"], alone["value"]) == ("missed", pytest.approx(500))


ABSENT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no-profile": ("ttft_ms", "<= 1e9", {"profile": {}}, "the run has no profile"),
    "no-such-engine": ("ttft_ms@c", "<= 1e9", {}, "no such workload"),
    "student-left-out": (
        "ttft_ms", "<= 1e9", {"profile": profile(TIMES | {"width": {}})}, "width was not measured",
    ),
    "no-teacher": (
        "ttft_ms", "<= 9x", {"profile": profile(TIMES | {"teacher": {}})}, "the teacher was not",
    ),
    "no-memory": (
        "ttft_ms@same_memory", "<= 1e9",
        {"profile": profile(TIMES | {"width": {("a", 8): (1.0, 1.0, 1.0)}})}, "teacher's memory",
    ),
    "no-value": (
        "prefill_tok_s@concurrency:4", ">= 0",
        {"profile": profile(loops=[(4, {"teacher": (1.0, 1.0), "width": (1.0, 1.0)})])},
        "no sample has this figure",
    ),
    "size": ("kv_bytes_per_token", "<= 1e9", {}, "it is not known"),
    "text": ("loss.train", "<= 9", {}, "width was not judged on train"),
    "task": ("task.b", ">= 0", {}, "width was not judged on b"),
    "no-share": (
        "task.b", ">= -3",
        {"evaluations": {"width": {"tasks": {"b": task(9.0, 1) | {"metric": "bleu"}}}},
         "differences": {"width": {"task.b": {"value": 0.0, "low": 0.0, "high": 0.0}}}},
        "bleu is no share",
    ),
    "nan": (
        "loss.validation", "<= 9",
        {"evaluations": {"width": {"texts": {"validation": text(math.nan, None)}}}}, "not a number",
    ),
    "teacher-not-judged": (
        "loss.validation", "<= +9", {"evaluations": {"width": EVALUATIONS["width"]}},
        "teacher was not judged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("id", ABSENT)
def test_what_was_not_measured_is_absent(id: str) -> None:
    key, bound, given, reason = ABSENT[id]
    found = verdict(key, bound, **given)
    assert (found["verdict"], found["value"], found["low"]) == ("absent", None, None)
    assert reason in found["text"]
    assert reason in said(found)


def test_a_single_sample_decides_nothing() -> None:
    one = {n: {("a", 8): rows[("a", 8)][:1]} for n, rows in TIMES.items()}
    for bound in (">= 1.1x", ">= 1", ">= +1"):
        found = verdict("output_tok_s", bound, profile=profile(one))
        assert (found["verdict"], found["low"]) == ("undecided", None)
        assert "of unknown spread" in said(found)
    lonely = {"width": {"texts": {"validation": text(3.0, None)}}}
    assert verdict("loss.validation", "<= 9", evaluations=lonely)["verdict"] == "undecided"


def test_pairs_decide_what_two_intervals_do_not() -> None:
    for bound, unpaired in (("<= +0.12", "undecided"), ("<= +0.15", "met"), ("<= +0.05", "missed")):
        assert verdict("loss.validation", bound)["verdict"] == unpaired
    pairs = {"width": {"loss.validation": {"value": 0.1, "low": 0.09, "high": 0.11},
                       "task.a": {"value": -0.02, "low": -0.025, "high": -0.015}}}  # fmt: skip
    assert verdict("loss.validation", "<= +0.12", differences=pairs)["verdict"] == "met"
    found = verdict("perplexity.validation", "<= 1.12x", differences=pairs)
    assert (found["verdict"], found["high"]) == ("met", pytest.approx(math.exp(0.11)))
    found = verdict("task.a", ">= -3", differences=pairs)
    assert (found["verdict"], found["value"], found["low"]) == ("met", -2.0, -2.5)
    assert verdict("task.a", ">= -3")["verdict"] == "undecided"


def test_goals_are_required() -> None:
    goals = {"params": "<= 0.5x", "loss.validation": "<= +0.05", "ttft_ms": "<= 1"}
    found = judged(
        goals, models=MODELS, profile={}, evaluations=EVALUATIONS, differences={}
    )  # fmt: skip
    require(found[:1], where="report.html")
    with pytest.raises(ParetronError) as caught:
        require(found, where="report.html")
    assert caught.value.exit_code == 5
    assert {p.code for p in caught.value.problems} == {Code.GATE_GOALS}
    causes = [p.cause for p in caught.value.problems]
    assert causes[0].startswith(
        "width: loss.validation at most 0.05 nats a token above the teacher's: missed, 0.1"
    )
    assert causes[1].startswith("width: ttft_ms at most 1: absent")
    with pytest.raises(ParetronError, match="no goal to require") as caught:
        require([], where="report.html")
    assert caught.value.exit_code == 2
