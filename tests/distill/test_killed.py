"""Real processes, killed with SIGKILL: what they leave, and what the next one makes of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import pytest

from paretron.artifacts.manifest import verify
from paretron.distill.job import Job
from trainingprocess import exit_with

Arguments = Callable[..., dict[str, Any]]


@contextmanager
def training(given: dict[str, Any], folder: Path) -> Iterator[tuple[BaseProcess, TextIO]]:
    """A process that trains, and the events that it sends."""
    job_file, pipe = folder / "job.json", folder / "events"
    fields = {k: v for k, v in given.items() if k != "on_event"}
    job_file.write_text(Job(**fields, overwrite=False).to_json())
    if not pipe.exists():
        os.mkfifo(pipe)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paretron.distill.worker"])  # imported once, not once a child
    # Open for both, so that neither end waits for the other.
    with os.fdopen(os.open(pipe, os.O_RDWR), "r") as events:
        process = context.Process(target=exit_with, args=(job_file, pipe))
        process.start()
        try:
            yield process, events
        finally:
            process.kill()
            process.join()


def kill_after_step(given: dict[str, Any], folder: Path, step: int) -> None:
    with training(given, folder) as (process, events):
        for line in events:
            message = json.loads(line)
            if message.get("event") == "step" and message["fields"]["step"] == step:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
                return


def finish(given: dict[str, Any], folder: Path) -> None:
    with training(given, folder) as (process, _events):
        process.join(120)
        assert process.exitcode == 0


def content(out: Path) -> dict[str, str]:
    return {name: file["sha256"] for name, file in verify(out)["files"].items()}


def elsewhere(given: dict[str, Any], name: str) -> dict[str, Any]:
    return given | {
        "out": given["out"].with_name(name),
        "state": given["state"].with_name(f"{name}-state"),
    }


@pytest.mark.parametrize("distil", [True, False])
def test_twenty_steps_are_ten_and_a_kill_and_ten(
    arguments: Arguments, tmp_path: Path, distil: bool
) -> None:
    given = arguments(
        steps=20, distil=distil, checkpoint_every=10, eval_every=6, validate=True, micro_batch=2
    )
    finish(given, tmp_path)
    killed = elsewhere(given, "killed")
    kill_after_step(killed, tmp_path, 13)
    assert not killed["out"].exists()
    verify(killed["state"] / "step-000010")
    finish(killed, tmp_path)
    assert "metrics.json" in content(given["out"])
    assert content(killed["out"]) == content(given["out"])


def test_kills_at_any_moment_of_saving_do_no_harm(arguments: Arguments, tmp_path: Path) -> None:
    given = arguments(steps=20, checkpoint_every=1)
    finish(given, tmp_path)
    killed = elsewhere(given, "killed")
    moments = random.Random(0)
    for step in (1, 3, 5, 7, 9):
        with training(killed, tmp_path) as (process, events):
            for line in events:
                message = json.loads(line)
                if message.get("event") == "step" and message["fields"]["step"] >= step:
                    time.sleep(moments.uniform(0, 0.06))
                    process.kill()
                    break
        for folder in killed["state"].glob("step-*"):
            verify(folder)
    finish(killed, tmp_path)
    assert content(killed["out"]) == content(given["out"])
