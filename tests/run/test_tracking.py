"""Trackers: asked for by name, shown figures alone, absent ones told before any work."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron.run.tensorboard import TensorBoard
from paretron.run.tracking import Tracked
from paretron.run.trackio import Trackio
from paretron.run.wandb import Wandb
from picorun import paretron, write_pico_recipe

EVENTS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("started", {}),
    ("step", {"step": 1, "tokens": 64, "loss": 2.5, "mfu": None, "memory_gb": 1.5}),
    ("eval", {"step": 1, "tokens": 64, "loss": 2.25}),
    ("note", {"message": "hf_secret"}),
)


def test_a_tracker_that_is_absent_is_told_before_any_work(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    recipe = write_pico_recipe(tmp_path)
    done = paretron("run", recipe, "--out", tmp_path / "run", "--offline", "--wandb", "pico")
    assert done.returncode == 6
    assert "wandb is not installed" in done.stderr
    assert 'pip install "paretron[wandb]"' in done.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_gets_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the real call signatures: the run that `init` gives logs and finishes."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("axis", (name, step_metric)))

        def log(self, data: dict[str, float]) -> None:
            calls.append(("log", data))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(project: str, settings: dict[str, Any]) -> Run:
        calls.append(("init", (project, settings)))
        return Run()

    fake = types.ModuleType("wandb")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setattr(fake, "Settings", dict, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    passed: list[str] = []
    with Tracked(Wandb("pico"), then=lambda stage, kind, fields: passed.append(kind)) as watcher:
        for kind, fields in EVENTS:
            watcher("distill", kind, fields)
    assert passed == [kind for kind, _ in EVENTS]
    assert [name for name, _ in calls] == ["init", "axis", "log", "log", "finish"]
    assert calls[2][1] == {
        "distill/step/loss": 2.5, "distill/step/memory_gb": 1.5, "tokens": 64,
    }  # fmt: skip
    settings = calls[0][1][1]
    assert settings["disable_git"]
    assert settings["x_disable_meta"]
    assert "hf_secret" not in json.dumps([str(call) for call in calls])


@pytest.mark.parametrize("tracker", [Wandb, Trackio])
def test_a_tracker_that_is_absent_is_exit_6(
    tracker: type[Wandb | Trackio], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker.name, None)
    with pytest.raises(ParetronError, match=rf"{tracker.name} is not installed") as caught:
        tracker("pico")
    assert caught.value.problems[0].code is Code.OPTIONAL_MISSING


def test_trackio_gets_figures_alone_and_prints_nothing_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the real call signatures; the library prints where its project lies."""
    calls: list[tuple[str, Any]] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append(("log", (step, metrics)))

    def finish() -> None:
        print("* Run finished.")
        calls.append(("finish", None))

    def init(project: str, *, embed: bool, auto_log_gpu: bool, auto_log_cpu: bool) -> Run:
        print("* Trackio project initialized")
        calls.append(("init", (project, embed, auto_log_gpu, auto_log_cpu)))
        return Run()

    fake = types.ModuleType("trackio")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setattr(fake, "finish", finish, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with Tracked(Trackio("pico"), then=lambda stage, kind, fields: None) as watcher:
        for kind, fields in EVENTS:
            watcher("distill", kind, fields)
    assert [name for name, _ in calls] == ["init", "log", "log", "finish"]
    assert calls[0][1] == ("pico", False, False, False)
    figures = {"distill/step/loss": 2.5, "distill/step/memory_gb": 1.5}
    assert calls[1][1] == (64, figures)
    assert capsys.readouterr().out == ""


def test_trackio_s_failure_is_told_once_and_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise OSError("no room for its database")

    fake = types.ModuleType("trackio")
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    said: list[str] = []

    def watch(stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        said.append(str(fields["message"]) if kind == "note" else kind)

    with Tracked(Trackio("pico"), then=watch) as watcher:
        for kind, fields in EVENTS:
            watcher("distill", kind, fields)
    notes = [line for line in said if "trackio is left out from here on" in line]
    assert notes == ["trackio is left out from here on: OSError: no room for its database"]
    assert {kind for kind, _ in EVENTS} - {"note"} <= set(said)


def test_tensorboard_writes_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Tracked(TensorBoard(tmp_path), then=lambda stage, kind, fields: None) as watcher:
        for kind, fields in EVENTS:
            watcher("distill", kind, fields)
    (file,) = tmp_path.glob("events.*")
    assert b"distill/step/loss" in file.read_bytes()
