"""Same batch and same memory: batches, ratios, and what they are computed from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.families import parameter_counts
from paretron.recipe import Profile, Slo
from paretron_profiling.compare import (
    LARGEST_BATCH_FACTOR,
    SAME_BATCH,
    SAME_LATENCY,
    SAME_MEMORY,
    Speedup,
    match_memory,
    speedups,
)
from paretron_profiling.models import ModelFacts, ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.schedule import cells, check_lengths, limits_of
from paretron_profiling.schema import Measurement, Sample, Workload

sizes = st.builds(
    lambda weights, kv: ModelFacts(320, weights, kv, 512),
    st.integers(1, 10**10),
    st.integers(1, 10**6),
)


@given(sizes, sizes, st.integers(1, 64), st.integers(1, 4096))
def test_the_largest_batch_that_fits(
    teacher: ModelFacts, student: ModelFacts, reference: int, context_len: int
) -> None:
    match = match_memory(
        student, teacher=teacher, reference_batch=reference, context_len=context_len
    )
    budget = teacher.memory_bytes(batch=reference, context_len=context_len)
    assert match.memory_bytes == budget
    cap = LARGEST_BATCH_FACTOR * reference
    assert 0 <= match.batch <= cap
    if match.batch:
        assert student.memory_bytes(batch=match.batch, context_len=context_len) <= budget
    if match.limit == "memory" and match.batch < cap:
        assert student.memory_bytes(batch=match.batch + 1, context_len=context_len) > budget
    if match.limit == "cap":
        assert student.memory_bytes(batch=cap + 1, context_len=context_len) <= budget


@given(sizes, st.integers(1, 64), st.integers(1, 4096))
def test_a_model_in_its_own_memory(facts: ModelFacts, reference: int, context_len: int) -> None:
    match = match_memory(facts, teacher=facts, reference_batch=reference, context_len=context_len)
    assert (match.batch, match.limit) == (reference, "memory")


@given(sizes, sizes, st.sampled_from([2, 4]))
def test_the_batch_does_not_depend_on_the_dtype(
    teacher: ModelFacts, student: ModelFacts, factor: int
) -> None:
    def wider(facts: ModelFacts) -> ModelFacts:
        return ModelFacts(320, factor * facts.weight_bytes, factor * facts.kv_bytes_per_token, 512)

    narrow = match_memory(student, teacher=teacher, reference_batch=4, context_len=128)
    wide = match_memory(wider(student), teacher=wider(teacher), reference_batch=4, context_len=128)
    assert wide.batch == narrow.batch


def test_paper_shapes() -> None:
    """Llama-3.1 8B and its 4B students in FP8: depth fits more sequences than width."""
    teacher = ModelFacts(128256, 8030261248, 32 * 2 * 8 * 128, 131072)
    width = ModelFacts(128256, 4512746496, 32 * 2 * 8 * 128, 131072)
    depth = ModelFacts(128256, 4540469248, 16 * 2 * 8 * 128, 131072)
    found = [
        match_memory(s, teacher=teacher, reference_batch=32, context_len=4096).batch
        for s in (width, depth)
    ]
    assert found == [45, 90]


def _model(name: str, weights: int, kv: int) -> ModelUnderTest:
    return ModelUnderTest(name, name, {}, ModelFacts(320, weights, kv, 512))


TEACHER = _model("teacher", 1000, 10)
WIDTH = _model("width", 600, 10)
DEPTH = _model("depth", 600, 5)


def _profile(**settings: object) -> Profile:
    base = {"engines": [{"name": "ortgenai"}], "batches": [1, 2], "lengths": [[6, 4]]}
    return Profile.model_validate(base | settings)


def test_schedule_interleaves_and_adds_same_memory_batches() -> None:
    (cell,) = cells("ortgenai", models=[TEACHER, WIDTH, DEPTH], profile=_profile())
    # Budget 1000 + 2 * 10 * 10 = 1200: width 600 / 100 = 6, depth 600 / 50 = 12.
    expected = [
        ("teacher", 1), ("width", 1), ("depth", 1),
        ("teacher", 2), ("width", 2), ("depth", 2),
        ("width", 6), ("depth", 12),
    ]  # fmt: skip
    assert [(u.model, u.work.load) for u in cell.units] == expected
    assert [(u.model, u.work.load) for u in cell.in_round(1)] == expected[::-1]
    assert cell.in_round(0) == cell.in_round(2) == cell.units


def test_drift_favours_no_model_over_two_rounds() -> None:
    (cell,) = cells("ortgenai", models=[TEACHER, WIDTH, DEPTH], profile=_profile(batches=[1]))
    order = [*cell.in_round(0), *cell.in_round(1)]
    mean = {u: sum(i for i, o in enumerate(order) if o == u) / 2 for u in cell.units}
    assert len(set(mean.values())) == 1


def test_limits_cover_the_plan() -> None:
    plan = list(cells("e", models=[TEACHER, DEPTH], profile=_profile(lengths=[[6, 4], [2, 3]])))
    limits = limits_of(DEPTH, plan=plan, profile=_profile())
    works = [u.work for c in plan for u in c.units if u.model == "depth"]
    assert limits.batch == max(w.load for w in works)
    assert limits.context_len == 10
    assert limits.kv_bytes == max(w.load * (w.input_len + w.output_len) for w in works) * 5


def test_lengths_beyond_the_context_are_problems() -> None:
    problems = check_lengths([TEACHER, WIDTH], profile=_profile(lengths=[[500, 12], [500, 13]]))
    assert [p.code.value for p in problems] == ["recipe.value"] * 2
    assert "513" not in problems[0].cause
    assert "500 + 13" in problems[0].cause
    assert "512" in problems[0].fix


def _measurement(batch: int, totals_s: list[float]) -> Measurement:
    work = Workload.at_once("e", batch, 6, 4)
    samples = [
        Sample.in_lockstep([t * k / 4 for k in (1, 2, 3, 4)], tokens=[[0] * 4] * batch)
        for t in totals_s
    ]
    return Measurement.of(work, samples=samples, warmup=1)


def test_speedups_name_rule_and_batches() -> None:
    measured = {
        # The machine halves its speed in the last round: the ratios do not notice.
        "teacher": [_measurement(2, [1.0, 1.0, 2.0])],
        "width": [_measurement(2, [0.5, 0.4, 1.0]), _measurement(6, [1.0, 1.1, 2.0])],
        "depth": [_measurement(12, [2.0, 2.0, 4.0])],
    }
    found = speedups(measured, models=[TEACHER, WIDTH, DEPTH])
    assert [(s.model, s.rule, s.load, s.teacher_load, s.limit) for s in found] == [
        ("width", SAME_BATCH, 2, 2, None),
        ("width", SAME_MEMORY, 6, 2, "memory"),
        ("depth", SAME_MEMORY, 12, 2, "memory"),
    ]
    assert [s.ratio for s in found] == pytest.approx([2.0, 3.0, 3.0])
    assert found[0].interval == pytest.approx((2.0, 2.5))
    assert (found[0].pairs, found[0].coverage) == (3, 0.75)
    assert found[1].memory_bytes == 1200
    assert found[0].flags == ("noisy",)
    for s in found:
        assert Speedup.from_json(json.loads(json.dumps(s.to_json(), allow_nan=False))) == s


def _loop(mode: str, load: float, *, each_s: float, count: int = 8) -> Measurement:
    """Requests one after the other, the first token after half of the time of each."""
    work = Workload("e", mode, load, 6, 4)
    sent = tuple(each_s * k for k in range(count))
    sample = Sample(
        sent,
        tuple(s + each_s / 2 for s in sent),
        tuple(s + each_s for s in sent),
        (each_s / 6,) * (3 * count),
    )
    return Measurement.of(work, samples=[sample] * 3, warmup=1)


def test_every_figure_above_one_is_the_students_advantage() -> None:
    def of(factor: float) -> list[Measurement]:
        batch = _measurement(2, [1.0 / factor] * 3)
        return [batch, *(_loop(m, 2, each_s=1.0 / factor) for m in ("closed", "open"))]

    measured = {"teacher": of(1), "width": of(2)}
    same = [s for s in speedups(measured, models=[TEACHER, WIDTH]) if s.rule == SAME_BATCH]
    assert [(s.mode, s.figure, set(s.parts)) for s in same] == [
        ("offline", "output_tok_s", {"prefill_tok_s", "decode_tok_s"}),
        ("closed", "output_tok_s", {"ttft_ms", "tpot_ms"}),
        ("open", "e2e_ms", {"ttft_ms", "tpot_ms"}),
    ]
    for s in same:
        assert s.ratio == pytest.approx(2)
        assert {n: pytest.approx(2) for n in s.parts} == {n: p.ratio for n, p in s.parts.items()}
        assert Speedup.from_json(json.loads(json.dumps(s.to_json()))) == s


def test_same_memory_of_requests_in_flight_but_not_of_a_rate() -> None:
    profile = _profile(batches=[], concurrency=[1, 2], rates=[2.0])
    closed, opened = cells("e", models=[TEACHER, WIDTH], profile=profile, modes=("closed", "open"))
    assert [(u.model, u.work.load, u.matched) for u in closed.units] == [
        ("teacher", 1, False), ("width", 1, False), ("teacher", 2, False), ("width", 2, False),
        ("width", 6, True),
    ]  # fmt: skip
    assert [(u.model, u.work.load) for u in opened.units] == [("teacher", 2.0), ("width", 2.0)]
    measured = {
        "teacher": [_loop("closed", 2, each_s=1.0), _loop("open", 2, each_s=1.0)],
        "width": [_loop("closed", 6, each_s=0.25), _loop("open", 6, each_s=0.25)],
    }
    (found,) = speedups(measured, models=[TEACHER, WIDTH])
    assert (found.rule, found.mode, found.load) == (SAME_MEMORY, "closed", 6)
    assert found.ratio == pytest.approx(4)


def test_same_latency_takes_the_best_load_within_the_slo() -> None:
    slo = Slo(ttft_ms=600, tpot_ms=200)

    def at(load: float, each_s: float, count: int = 8) -> Measurement:
        return _loop("closed", load, each_s=each_s, count=count)

    # TTFT is half of each_s: the teacher is within at 1 s, not at 1.3 s; the student at both loads.
    measured = {
        "teacher": [at(1, 1.0), at(2, 1.3), at(4, 1.3)],
        "width": [at(1, 0.5), at(2, 0.4), at(4, 1.3), at(99, 0.1)],
    }
    (found,) = [
        s for s in speedups(measured, models=[TEACHER, WIDTH], slo=slo) if s.rule == SAME_LATENCY
    ]
    assert (found.load, found.teacher_load, found.limit) == (2, 1, "slo")
    assert found.ratio == pytest.approx(1.0 / 0.4)
    assert (found.figure, found.parts) == ("output_tok_s", {})
    highest = measured | {"width": [at(1, 0.5), at(2, 0.4), at(4, 0.3)]}
    ends = speedups(highest, models=[TEACHER, WIDTH], slo=slo)
    assert [s.limit for s in ends if s.rule == SAME_LATENCY] == ["highest"]
    # Nobody is within: no ratio. A request that failed is not answered in time.
    failed = measured | {"teacher": [replace(m, failed=1) for m in measured["teacher"]]}
    for times, limits in ((measured, Slo(ttft_ms=1, tpot_ms=1)), (failed, slo)):
        found_rules = {s.rule for s in speedups(times, models=[TEACHER, WIDTH], slo=limits)}
        assert found_rules == {SAME_BATCH}


def test_pairs_without_an_answer_are_left_out() -> None:
    base, other = _measurement(2, [1.0, 1.0, 1.0]), _measurement(2, [0.5, 0.5, 0.5])
    nothing = Sample((), (), (), (), ("refused",) * 2)
    broken = replace(other, samples=(other.samples[0], nothing, other.samples[2]))
    found = speedups({"teacher": [base], "width": [broken]}, models=[TEACHER, WIDTH])
    assert [(s.rule, s.pairs) for s in found] == [(SAME_BATCH, 2)]
    none = replace(other, samples=(nothing,) * 3)
    assert speedups({"teacher": [base], "width": [none]}, models=[TEACHER, WIDTH]) == ()


def test_an_engine_that_takes_less_caps_the_batch() -> None:
    (cell,) = cells("e", models=[TEACHER, WIDTH], profile=_profile(batches=[2]), largest_batch=4)
    assert [(u.model, u.work.load) for u in cell.units][-1] == ("width", 4)
    measured = {"teacher": [_measurement(2, [1.0])], "width": [_measurement(4, [1.0])]}
    (found,) = speedups(measured, models=[TEACHER, WIDTH], largest_batches={"e": 4})
    assert (found.rule, found.load, found.limit) == (SAME_MEMORY, 4, "cap")
    # What was not measured, because a run ended early, is not made up from another batch.
    assert speedups(measured, models=[TEACHER, WIDTH], largest_batches={"e": None}) == ()


def test_without_a_teacher_there_is_no_ratio() -> None:
    assert speedups({"width": [_measurement(2, [1.0])]}, models=[WIDTH]) == ()


def test_facts_of_a_checkpoint(models: list[ModelUnderTest]) -> None:
    from paretron.artifacts.reader import Checkpoint

    for model in models:
        opened = Checkpoint.open(Path(model.folders["hf"]))
        total = parameter_counts(opened.family, opened.config).total
        assert model.facts.weight_bytes == 4 * total
        layers = 2 if model.name == "depth" else 4
        assert model.facts.kv_bytes_per_token == layers * 2 * 2 * 32 * 4
        assert model.facts.special_ids == {0, 1, 2}
        assert (model.facts.vocab_size, model.facts.context_len) == (320, 512)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(4, 400), st.text(max_size=5))
def test_prompts(batch: int, input_len: int, vocab_size: int, seed: str) -> None:
    settings = {"batch": batch, "input_len": input_len, "vocab_size": vocab_size}
    prompts = random_prompts(**settings, avoid={0, 2}, seed=seed)
    assert [len(p) for p in prompts] == [input_len] * batch
    assert {t for p in prompts for t in p} <= set(range(vocab_size)) - {0, 2}
    assert random_prompts(**settings, avoid={0, 2}, seed=seed) == prompts
    if batch * input_len > 60 and vocab_size > 50:
        assert random_prompts(**settings, avoid={0, 2}, seed=seed + "x") != prompts
