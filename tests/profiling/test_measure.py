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
from paretron_profiling.engines.engine import Pace
from paretron_profiling.measure import check_engines, profile_models
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileResult, ProfileStopped
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN, Sample

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
        (f["round"], f["model"], f["load"])
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
            batches = [m.load for m in mine]
            assert batches[:2] == [1, 2]
            assert len(batches) == (2 if name == "teacher" else 3)
            assert all(m.repeats == len(m.samples) == 3 for m in mine)
            assert all(m.output_tok_s and m.prefill_tok_s and m.tpot_ms for m in mine)
            assert all("no_warmup" not in m.flags for m in mine)
    for rule, count in (("same_batch", 2), ("same_memory", 1), ("same_latency", 1)):
        assert sum(s.rule == rule for s in result.speedups) == 2 * 2 * count
    for speedup in result.speedups:
        assert speedup.interval[0] <= speedup.ratio <= speedup.interval[1]
        assert speedup.figure == "output_tok_s"
        parts = set() if speedup.rule == "same_latency" else {"prefill_tok_s", "decode_tok_s"}
        assert set(speedup.parts) == parts
    # Each engine has run every model at its heaviest, and neither is a process of its own.
    peaks = {(p.work.engine, p.model): p for p in result.memory}
    assert len(peaks) == 2 * 3
    assert {p.work.load for (_, model), p in peaks.items() if model == "teacher"} == {2}
    assert {p.work.load for (_, model), p in peaks.items() if model != "teacher"} == {16, 12}
    assert not any(p.own_process for p in peaks.values())
    assert set(result.engines) == {"ortgenai", "transformers"}
    assert result.hardware["threads"]
    assert result.method["seed"] == 5


def test_json_and_back(run: tuple[ProfileResult, Events]) -> None:
    result, _ = run
    text = json.dumps(result.to_json(), allow_nan=False)
    again = ProfileResult.from_json(json.loads(text))
    assert again.to_json() == result.to_json()
    assert json.loads(text)["schema"] == "profile.v1"
    # From before there were such parts: they are empty.
    older = {k: v for k, v in json.loads(text).items() if k not in ("memory", "device", "roofline")}
    assert ProfileResult.from_json(older).memory == ()
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
    # The very first session brings the libraries, and is thrown away.
    assert opened == ["teacher", "teacher", "width", "width", "teacher"]
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
    (problem,) = check_engines(profile_of("ortgenai", "transformers", concurrency=[4]))
    assert problem.where == "profile.concurrency"
    assert "ortgenai, transformers" in problem.cause
    assert "vllm_server" in problem.fix


def test_an_export_that_no_model_has(teacher: ModelUnderTest) -> None:
    bare = ModelUnderTest("teacher", "teacher", {"hf": teacher.folders["hf"]}, teacher.facts)
    with pytest.raises(ParetronError, match="'onnx', which no model has"):
        profile_models([bare], profile=profile_of("ortgenai"))


class Faulty:
    """An engine that answers at constant speed until its last breath."""

    name, wants, session_bytes, largest_batch, pid = "ortgenai", "onnx", 0, 32, None
    modes = frozenset({OFFLINE})
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


class Serving(Faulty):
    """A server of constant speed, which counts who is open and what it was asked for."""

    name, modes = "vllm_server", frozenset({OFFLINE, CLOSED, OPEN})

    def __init__(self, fail: int = 0) -> None:
        super().__init__(answers=10**6)
        self.fail, self.most_open = fail, 0
        self.paces: list[tuple[Pace, int]] = []

    @contextmanager
    def open(self, model_dir: Path, *, settings: object, limits: object) -> Iterator[Faulty]:
        with super().open(model_dir, settings=settings, limits=limits) as opened:
            self.most_open = max(self.most_open, self.open_now)
            yield opened

    def serve(self, prompts: list[list[int]], output_len: int, *, pace: Pace) -> Sample:
        self.paces.append((pace, len(prompts)))
        count = len(prompts) - self.fail
        sent = tuple(0.1 * k for k in range(count))
        return Sample(
            sent,
            tuple(t + 0.2 for t in sent),
            tuple(t + 0.5 for t in sent),
            (0.1,) * (count * (output_len - 1)),
            failures=("refused",) * self.fail,
        )


LOOPS: dict[str, Any] = {"batches": [], "concurrency": [2, 16], "rates": [4.0]}


def test_loops_go_to_the_engine_that_serves(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, eager = Serving(), Faulty(answers=10**6)
    engines = {"vllm_server": server, "ortgenai": eager}
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: engines[name])
    profile = profile_of("vllm_server", "ortgenai", **LOOPS | {"batches": [1]}, min_seconds=20)
    result = profile_models(models[:1], profile=profile, seed=7)
    (found,) = result.measurements.values()
    loads = [(m.engine, m.mode, m.load) for m in found]
    assert loads == [
        ("vllm_server", "offline", 1), ("vllm_server", "closed", 2), ("vllm_server", "closed", 16),
        ("vllm_server", "open", 4.0), ("ortgenai", "offline", 1),
    ]  # fmt: skip
    counts = dict(server.paces)
    assert counts == {
        Pace("closed", 2, 7): 32, Pace("closed", 16, 7): 128, Pace("open", 4.0, 7): 32,
    }  # fmt: skip
    # Rounds went on until each was measured for 20 s: 0.6 s, 3.6 s, 13.2 s and 3.6 s a sample.
    assert [m.repeats for m in found] == [34, 6, 6, 6, 34]
    assert all(m.measured_s >= 20 and "short" not in m.flags for m in found)
    assert [m.requests for m in found] == [34, 6 * 32, 6 * 128, 6 * 32, 34]


def test_failed_requests_are_counted_and_flagged(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: Serving(fail=3))
    result = profile_models(models[:1], profile=profile_of("vllm_server", **LOOPS))
    for m in result.measurements["teacher"]:
        assert m.failed == 3 * 3
        assert "failures" in m.flags
        assert m.good_share == pytest.approx(1 - m.failed / m.requests)


@pytest.mark.parametrize(("sessions", "open_at_once"), [("together", 3), ("in_turn", 1)])
def test_servers_open_together_or_in_turn(
    sessions: str, open_at_once: int, models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Serving()
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: server)
    result = profile_models(models, profile=profile_of("vllm_server", **LOOPS, sessions=sessions))
    assert server.most_open == open_at_once
    assert {m.repeats for found in result.measurements.values() for m in found} == {3}
    # Of an open loop the rate is given: what differs is how long a request takes.
    assert {s.figure for s in result.speedups if s.mode == "open"} == {"e2e_ms"}
    assert all(s.ratio == pytest.approx(1) for s in result.speedups if s.load == s.teacher_load)


def test_what_differs_between_the_models_sessions_is_said_of_each(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Apart(Faulty):
        @contextmanager
        def open(self, model_dir: Path, *, settings: object, limits: object) -> Iterator[Faulty]:
            session = Faulty(answers=10**6)
            width = model_dir == models[1].folders["onnx"]
            session.about = {"version": "0", "dtype": "bfloat16" if width else "float32"}
            yield session

    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: Apart(0))
    for sessions in ("together", "in_turn"):
        profile = profile_of("ortgenai", batches=[1], sessions=sessions)
        found = profile_models(models[:2], profile=profile).engines["ortgenai"]
        assert found == {"version": "0", "dtype": "teacher float32, width bfloat16"}


class Narrow(Faulty):
    """An engine that dies of more requests at once than it can hold."""

    def __init__(self, most: int) -> None:
        super().__init__(answers=10**6)
        self.most = most
        self.asked: list[int] = []

    def generate(self, prompts: list[list[int]], output_len: int) -> Sample:
        self.asked.append(len(prompts))
        if len(prompts) > self.most:
            raise ParetronError(Problem(Code.MEMORY, "out of memory"))
        return super().generate(prompts, output_len)


@pytest.mark.parametrize(("most", "tried", "load"), [(9, [12, 9], 9), (2, [12, 9, 6, 4, 3], 2)])
def test_what_fits_by_calculation_goes_down_until_it_runs(
    most: int, tried: list[int], load: int, models: list[ModelUnderTest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = Narrow(most)
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: engine)
    events: Events = []
    result = profile_models(
        models[:2],
        profile=profile_of("ortgenai"),
        on_event=lambda kind, fields: events.append((kind, fields)),
    )
    assert [n for n in engine.asked if n > 2][: len(tried)] == tried
    notes = [str(f["message"]) for kind, f in events if kind == "note"]
    assert notes[0] == (
        "ortgenai refuses 12 requests of width, which fit by calculation: 9 is measured"
    )
    assert len(notes) == sum(n > most for n in tried)
    (found,) = [s for s in result.speedups if s.rule == "same_memory"]
    assert (found.load, found.teacher_load, found.limit) == (load, 2, "refused")
    assert max(m.load for m in result.measurements["width"]) == load
    assert engine.open_now == 0


class Silent(Faulty):
    """An engine that starts for the teacher alone."""

    def __init__(self) -> None:
        super().__init__(answers=10**6)
        self.starts = 0

    @contextmanager
    def open(self, model_dir: Path, *, settings: object, limits: object) -> Iterator[Faulty]:
        if "width" in str(model_dir):
            self.starts += 1
            raise ParetronError(Problem(Code.ENGINE, "not healthy after 600 s"))
        with super().open(model_dir, settings=settings, limits=limits) as session:
            yield session


def test_an_engine_that_never_starts_is_asked_twice_at_most(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Silent()
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: engine)
    with pytest.raises(ProfileStopped, match="not healthy"):
        profile_models(models[:2], profile=profile_of("ortgenai"))
    assert engine.starts == 2


def test_what_the_recipe_asks_for_is_not_lowered(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: Narrow(most=1))
    with pytest.raises(ProfileStopped, match="out of memory") as caught:
        profile_models(models[:2], profile=profile_of("ortgenai"))
    assert caught.value.exit_code == 4
    assert caught.value.partial.measurements == {"teacher": (), "width": ()}


def test_an_engine_that_dies_leaves_a_partial_result(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A trial, warm-up and one whole round of 2 models, then the student of the second round.
    engine = Faulty(answers=2 + 2 + 2 + 1)
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


def test_what_was_measured_is_kept_when_somebody_stops_it(
    models: list[ModelUnderTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Faulty):
        def generate(self, prompts: list[list[int]], output_len: int) -> Sample:
            if self.left == 0:
                raise KeyboardInterrupt
            return super().generate(prompts, output_len)

    engine = Stopped(answers=1 + 1 + 2)
    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: engine)
    with pytest.raises(ProfileStopped) as caught:
        profile_models(models[:1], profile=profile_of("ortgenai", batches=[1]))
    assert caught.value.exit_code == 75
    assert engine.open_now == 0
    (kept,) = caught.value.partial.measurements["teacher"]
    assert (kept.repeats, caught.value.partial.incomplete) == (2, "stopped on request")
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
