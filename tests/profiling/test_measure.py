"""Profiling runs with real engines: order, pairing, completeness, and what happens on failure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import Profile
from paretron_profiling import machine, measure
from paretron_profiling.measure import check_engines, profile_models
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schema import Sample

Events = list[tuple[str, Mapping[str, object]]]


def profile_of(*engines: str, **settings: Any) -> Profile:
    base = {"batches": [1, 2], "lengths": [[8, 6]], "repeats": 3, "warmup": 1}
    return Profile.model_validate({"engines": [{"name": e} for e in engines]} | base | settings)


@pytest.fixture(scope="module")
def run(models: list[ModelUnderTest]) -> tuple[ProfileResult, Events]:
    events: Events = []
    result = profile_models(
        models,
        profile=profile_of("ortgenai", "transformers"),
        seed=5,
        on_event=lambda kind, fields: events.append((kind, fields)),
    )
    return result, events


def samples_of(events: Events, engine: str) -> list[tuple[Any, ...]]:
    return [
        (f["round"], f["model"], f["batch"])
        for kind, f in events
        if kind == "profile.sample" and f["engine"] == engine
    ]


def test_models_take_turns(run: tuple[ProfileResult, Events]) -> None:
    for engine in ("ortgenai", "transformers"):
        order = samples_of(run[1], engine)
        rounds = sorted({r for r, _, _ in order})
        assert rounds == [-1, 0, 1, 2]
        assert [r for r, _, _ in order] == sorted(r for r, _, _ in order)
        by_round = [[(m, b) for r, m, b in order if r == n] for n in rounds]
        # Every model at every batch, then each student at its same-memory batch.
        assert [m for m, _ in by_round[1]] == ["teacher", "width", "depth"] * 2 + ["width", "depth"]
        assert by_round[0] == by_round[2] == by_round[1][::-1]
        assert by_round[1] == by_round[3]


def test_the_result_is_whole(run: tuple[ProfileResult, Events]) -> None:
    result, _ = run
    assert result.incomplete is None
    for name, found in result.measurements.items():
        for engine in ("ortgenai", "transformers"):
            mine = [m for m in found if m.engine == engine]
            batches = [m.batch for m in mine]
            assert batches[:2] == [1, 2]
            assert len(batches) == (2 if name == "teacher" else 3)
            assert all(m.repeats == len(m.samples) == 3 for m in mine)
            assert all(m.output_tok_s and m.prefill_tok_s and m.tpot_ms for m in mine)
            assert all("no_warmup" not in m.flags for m in mine)
    rules = [(s.model, s.engine, s.rule, s.batch) for s in result.speedups]
    assert len(rules) == 2 * 2 * 3
    assert all(s.interval[0] <= s.ratio <= s.interval[1] for s in result.speedups)
    assert set(result.engines) == {"ortgenai", "transformers"}
    assert result.hardware["threads"]
    assert result.method["seed"] == 5


def test_json_and_back(run: tuple[ProfileResult, Events]) -> None:
    result, _ = run
    text = json.dumps(result.to_json(), allow_nan=False)
    again = ProfileResult.from_json(json.loads(text))
    assert again.to_json() == result.to_json()
    assert json.loads(text)["schema"] == "profile.v1"
    with pytest.raises(ValueError, match=r"profile\.v1"):
        ProfileResult.from_json({"schema": "profile.v2"})


def test_one_session_at_a_time_where_memory_is_short(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    events: Events = []
    result = profile_models(
        models[:2],
        profile=profile_of("ortgenai", batches=[2], repeats=2),
        on_event=lambda kind, fields: events.append((kind, fields)),
    )
    opened = [f["model"] for kind, f in events if kind == "profile.open"]
    assert opened == ["teacher", "width", "width", "teacher"]
    kept = [r for r, _, _ in samples_of(events, "ortgenai") if isinstance(r, int) and r >= 0]
    assert len(kept) == 2 * (1 + 2)
    assert [m.repeats for found in result.measurements.values() for m in found] == [2, 2, 2]
    # Three engines were never open at once, and each was warmed up after every start.
    assert sum(r < 0 for r, _, _ in samples_of(events, "ortgenai")) == 6


def test_all_problems_before_anything_runs(models: list[ModelUnderTest]) -> None:
    profile = profile_of("vllm", "ortgen", lengths=[[512, 2]])
    events: Events = []
    with pytest.raises(ParetronError) as caught:
        profile_models(models, profile=profile, on_event=lambda k, f: events.append((k, f)))
    causes = "\n".join(p.cause for p in caught.value.problems)
    assert "needs an interpreter" in causes
    assert "'ortgen'" in causes
    assert causes.count("512 + 2") == len(models)
    assert caught.value.exit_code == 2
    assert not events
    assert len(check_engines(profile)) == 2
    (problem,) = check_engines(profile_of("ortgenai", batches=[1, 33]))
    assert "at most 32, not 33" in problem.cause


def test_an_export_that_no_model_has(teacher: ModelUnderTest) -> None:
    bare = ModelUnderTest("teacher", "teacher", {"hf": teacher.folders["hf"]}, teacher.facts)
    with pytest.raises(ParetronError, match="'onnx', which no model has"):
        profile_models([bare], profile=profile_of("ortgenai"))


class Faulty:
    """An engine that answers at constant speed until its last breath."""

    name, wants, session_bytes, largest_batch = "ortgenai", "onnx", 0, 32
    about: Mapping[str, str] = {"version": "0"}

    def __init__(self, answers: int, cut: int = 0) -> None:
        self.left, self.cut, self.open_now = answers, cut, 0

    def check(self, settings: object) -> list[Problem]:
        return []

    @contextmanager
    def open(self, model_dir: Path, *, settings: object, limits: object) -> Iterator[Faulty]:
        self.open_now += 1
        try:
            yield self
        finally:
            self.open_now -= 1

    def generate(self, prompts: list[list[int]], output_len: int) -> Sample:
        if self.left == 0:
            raise ParetronError(Problem(Code.ENGINE, "the engine was killed by signal 9"))
        self.left -= 1
        times = [0.1 * (k + 1) for k in range(output_len)]
        return Sample.in_lockstep(times, tokens=[[3] * (output_len - self.cut)] * len(prompts))


def test_an_engine_that_dies_leaves_a_partial_result(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Warm-up and one whole round of 2 models, then the teacher of the second round.
    engine = Faulty(answers=2 + 2 + 1)
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: engine)
    same_size = [models[0], ModelUnderTest("width", "width", models[1].folders, models[0].facts)]
    with pytest.raises(ProfileStopped) as caught:
        profile_models(same_size, profile=profile_of("ortgenai", batches=[1]))
    assert caught.value.exit_code == 4
    partial = caught.value.partial
    assert partial.incomplete == "the engine was killed by signal 9"
    assert {n: [m.repeats for m in found] for n, found in partial.measurements.items()} == {
        "teacher": [1],
        "width": [2],
    }
    assert [s.pairs for s in partial.speedups] == [1, 1]
    assert all("few_repeats" in s.flags for s in partial.speedups)
    assert ProfileResult.from_json(partial.to_json()).incomplete == partial.incomplete
    assert engine.open_now == 0


def test_an_answer_that_stops_early_is_no_measurement(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "find_plugin", lambda group, name, *, where: Faulty(answers=99, cut=1)
    )
    with pytest.raises(ProfileStopped, match=r"answers of \[5\] tokens") as caught:
        profile_models(models[:1], profile=profile_of("ortgenai", batches=[1]))
    assert caught.value.partial.measurements == {"teacher": ()}
