"""Rows S2 and S10: a run that is stopped in any stage goes on, and one that is another is refused.

One recipe, every kind of stage: stopped in each, it ends all the same.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paretron.artifacts.manifest import verify
from picorun import events, write_pico_recipe

WORKER = Path(__file__).with_name("run_worker.py")
QUICK = ("data", "score", "width.prune", "report")  # in one process: both signals


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it gave out and said, and what it left running."""

    code: int
    out: str
    said: str
    alive: list[str]


class Runner:
    """Runs the command line in processes that stop themselves where they are told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def run(self, *arguments: str | Path, **job: Any) -> Ended:
        """One command."""
        wanted = {"arguments": [str(a) for a in arguments], "mark": uuid.uuid4().hex} | job
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._line()))

    def close(self) -> None:
        """End the worker."""
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


@dataclass(frozen=True)
class Stopped:
    """One stop: where it was wanted, by which signal, how it ended, and what was done by then."""

    stage: str
    number: signal.Signals
    ended: Ended
    finished: list[str]


@pytest.fixture(scope="module")
def stopped(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Stopped]]:
    """A finished run that was stopped in each of its stages, and every stop."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_pico_recipe(folder, students={"width": {"hidden": 48, "ffn": 64}})
    command = ("run", recipe, "--out", folder / "run", "--offline", "-q")
    plan = runner.run("plan", recipe, "--out", folder / "run", "--offline", "--json")
    stages = [s["name"] for s in json.loads(plan.out)["stages"] if s["name"] != "teacher"]
    evaluations = [s for s in stages if ".evaluate-" in s]
    stages = [s for s in stages if s not in evaluations[1:]]  # they differ in the model alone
    stops: list[Stopped] = []
    for k, stage in enumerate(stages):
        both = [signal.SIGTERM, signal.SIGINT]
        for number in both if stage in QUICK else both[k % 2 :][:1]:
            ended = runner.run(*command, stage=stage, at=0, signal=number)
            finished = [e["stage"] for e in events(folder / "run") if e["kind"] == "finished"]
            stops.append(Stopped(stage, number, ended, finished))
    last = runner.run(*command)
    assert last.code == 0, last.said
    return folder, stops


def test_s2_a_stop_in_any_stage_is_75_and_leaves_no_process(
    stopped: tuple[Path, list[Stopped]],
) -> None:
    _, stops = stopped
    stopped_in = " ".join(s.stage for s in stops)
    for kind in (
        "data", "correct", "score", "prune", "distill", "evaluate", "export-hf", "export-onnx",
        "profile", "report",
    ):  # fmt: skip
        assert kind in stopped_in
    assert {s.number for s in stops} == {signal.SIGTERM, signal.SIGINT}
    for stop in stops:
        assert stop.ended.code == 75, (stop.stage, stop.ended)
        assert "the same command continues" in stop.ended.said
        assert "Traceback" not in stop.ended.said
        assert stop.ended.alive == []
        assert stop.stage not in stop.finished


def test_s2_what_was_done_before_a_stop_is_not_done_again(
    stopped: tuple[Path, list[Stopped]],
) -> None:
    folder, stops = stopped
    done = [e["stage"] for e in events(folder / "run") if e["kind"] == "finished"]
    assert len(done) == len(set(done))
    assert {s.stage for s in stops} <= set(done)
    for stage in (folder / "run/stages").iterdir():
        verify(stage)  # nothing half-made lies among them


CHANGED: tuple[tuple[str, tuple[str, ...], dict[str, str], str], ...] = (
    ("recipe", ("--set", "distill.lr=2e-3"), {}, "settings.training.lr: 0.001 -> 0.002"),
    ("input", (), {}, "inputs."),
    ("text", (), {}, "content"),
    ("version", (), {"version": "9.9.9"}, "-> 9.9.9"),
)


@pytest.mark.parametrize(("what", "options", "job", "says"), CHANGED, ids=[c[0] for c in CHANGED])
def test_s10_what_another_recipe_input_or_version_made_is_not_taken(
    what: str,
    options: tuple[str, ...],
    job: dict[str, str],
    says: str,
    stopped: tuple[Path, list[Stopped]],
    runner: Runner,
) -> None:
    folder = stopped[0]
    changed = folder / {"input": "teacher/model.safetensors"}.get(what, "train.txt")
    as_it_was = changed.read_bytes()
    before = {p: p.stat().st_mtime_ns for p in (folder / "run/stages").rglob("*")}
    try:
        if what == "input":
            changed.write_bytes(as_it_was[:-1] + bytes([as_it_was[-1] ^ 1]))
        if what == "text":
            changed.write_bytes(as_it_was + b"one more line\n")
        ended = runner.run(
            "run", folder / "recipe.yaml", "--out", folder / "run", "--offline", "-q",
            *options, **job,
        )  # fmt: skip
    finally:
        changed.write_bytes(as_it_was)
    assert ended.code == 2, ended.said
    assert says in ended.said
    assert "--overwrite" in ended.said
    assert {p: p.stat().st_mtime_ns for p in (folder / "run/stages").rglob("*")} == before
