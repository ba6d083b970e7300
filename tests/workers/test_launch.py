from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paretron.errors import Code, ParetronError, Problem
from paretron.workers.launch import Story, error_of
from paretron.workers.relay import RelayWriter

DIED = Problem(Code.DEVICE, "a process died", where="state", fix="again")


def told(tmp_path: Path, *tell: Callable[[RelayWriter], None]) -> Story:
    """What the parent understands when these ranks speak in turn."""
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    story = Story()
    for rank, speak in enumerate(tell):
        speak(RelayWriter(tmp_path / "pipe", rank=rank))
    for line in os.read(pipe, 1 << 20).splitlines():
        story.hear(json.loads(line))
    os.close(pipe)
    return story


def test_problems_come_back_as_they_were_and_once(tmp_path: Path) -> None:
    error = ParetronError(
        Problem(Code.GATE_NONFINITE, "loss nan", where="x" * 9000, fix="lower"),
        Problem(Code.DISK, "full"),
    )
    story = told(tmp_path, lambda w: w.problems(error), lambda w: w.problems(error))
    raised = error_of(story, 1, "", DIED)
    assert isinstance(raised, ParetronError)
    assert [p.code for p in raised.problems] == [Code.GATE_NONFINITE, Code.DISK]
    assert raised.exit_code == 5
    assert raised.problems[0].cause == "loss nan"
    assert raised.problems[1] == Problem(Code.DISK, "full")


def test_the_first_cause_is_told_not_its_echo(tmp_path: Path) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    story = told(
        tmp_path, lambda w: w.failure(lost), lambda w: w.failure(ValueError("what happened"))
    )
    raised = error_of(story, 1, "", DIED)
    assert isinstance(raised, RuntimeError)
    assert "on rank 1" in str(raised)
    assert "what happened" in str(raised)


def test_a_killed_process_is_no_bug_of_ours(tmp_path: Path) -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    log = "exitcode: -9\ntraceback: Signal 9 (SIGKILL) received by PID 7\n"
    raised = error_of(told(tmp_path, lambda w: w.failure(lost)), 1, log, DIED)
    assert isinstance(raised, ParetronError)
    assert raised.problems[0].code is Code.DEVICE
    assert "Signal 9" in raised.problems[0].cause


def test_a_writer_whose_reader_is_gone_fails(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError):
        RelayWriter(tmp_path / "pipe", rank=0)
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    writer = RelayWriter(tmp_path / "pipe", rank=0)
    os.close(pipe)
    with pytest.raises(BrokenPipeError):
        writer.event("step", {})
