"""Group D: trainings that are killed, stopped or starved; real processes, and what the next makes
of what they left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.kills import kill_runs
from paretron.artifacts.manifest import verify
from trainingprocess import content, elsewhere, end_of, signal_at

Arguments = Callable[..., dict[str, Any]]


def published(given: dict[str, Any]) -> list[Path]:
    """The checkpoints that can be seen, each verified."""
    found = sorted(given["state"].glob("step-*"))
    for folder in found:
        verify(folder)
    return found


@pytest.mark.parametrize("distil", [True, False])
def test_d5_twenty_steps_are_ten_and_a_kill_and_ten(
    arguments: Arguments, tmp_path: Path, distil: bool
) -> None:
    given = arguments(
        steps=20, distil=distil, checkpoint_every=5, eval_every=6, validate=True, micro_batch=2
    )
    assert end_of(given, tmp_path)[0] == 0
    killed = elsewhere(given, "killed")

    def ten_are_saved(message: dict[str, Any]) -> bool:
        return bool(message.get("event") == "checkpoint" and message["fields"]["saved_step"] == 10)

    code, _ = signal_at(killed, tmp_path, ten_are_saved, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not killed["out"].exists()
    assert published(killed)
    code, said = end_of(killed, tmp_path)
    assert code == 0
    assert any("resumed after step 1" in str(m.get("fields")) for m in said)
    assert "metrics.json" in content(given["out"])
    assert content(killed["out"]) == content(given["out"])


def test_d3_kills_while_a_checkpoint_is_saved(arguments: Arguments, tmp_path: Path) -> None:
    """The long version is `python -m faults.kills`."""
    found = kill_runs(arguments(steps=6, checkpoint_every=1), tmp_path, runs=6)
    assert found.kills >= 5
    assert found.same


def test_d7_sigterm_saves_within_a_step_and_is_75(arguments: Arguments, tmp_path: Path) -> None:
    given = arguments(steps=400, checkpoint_every=1000)

    def fifth(message: dict[str, Any]) -> bool:
        return bool(message.get("event") == "step" and message["fields"]["step"] == 5)

    code, said = signal_at(given, tmp_path, fifth, signal.SIGTERM)
    assert code == 75
    steps = [m["fields"]["step"] for m in said if m.get("event") == "step"]
    (saved,) = published(given)
    assert saved.name == f"step-{steps[-1]:06d}"
    (problem,) = [m["problem"] for m in said if "problem" in m]
    assert "run the same command again" in problem["fix"]


def test_d15_a_disk_that_is_full_at_a_checkpoint(arguments: Arguments, tmp_path: Path) -> None:
    given = arguments(steps=200, checkpoint_every=1)
    code, said = end_of(given, tmp_path, largest_file=100_000)
    assert code == 4
    (problem,) = [m["problem"] for m in said if "problem" in m]
    assert problem["code"] == "resource.disk"
    assert published(given) == []

    def saved(message: dict[str, Any]) -> bool:
        return bool(message.get("event") == "checkpoint")

    signal_at(given, tmp_path, saved, signal.SIGKILL)
    before = {p.name: content(p) for p in published(given)}
    assert before
    assert end_of(given, tmp_path, largest_file=100_000)[0] == 4
    assert {p.name: content(p) for p in published(given)} == before
