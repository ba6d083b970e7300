"""Runs the command line on request, each time in a forked child: everything is imported once.

A line on standard input is a job; the answer is the child's exit code, what it said on standard
output and error, and which of its descendants are alive. With `signal` the child sends itself that
signal at the `at`-th event of the stage `stage`, as a terminal (the whole group) or a scheduler
(the one process) would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import paretron_exporters.hf
import paretron_exporters.onnx
from paretron.artifacts import models
from paretron.cli.main import main as command_line
from paretron.importance import stage as scoring
from paretron.run import events, reporting, runner, stages, workspace

IMPORTED = (torch, transformers, paretron_exporters, models, scoring, reporting, runner, stages)
MARK = "PARETRON_TEST_RUN"


def work(job: dict[str, Any]) -> None:
    """The command in this process, which is a new session."""
    os.setsid()
    os.environ[MARK] = job["mark"]
    # A shell's background job inherits that Ctrl-C is ignored; a user's command does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if "version" in job:
        workspace.__version__ = job["version"]
    if "signal" in job:
        _send_at_event(job["stage"], job["at"], signal.Signals(job["signal"]))
    command_line(job["arguments"])


def _send_at_event(wanted: str, at: int, number: signal.Signals) -> None:
    emit, seen = events.EventLog.emit, 0

    def counting(self: events.EventLog, stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        nonlocal seen
        emit(self, stage, kind, fields)
        if stage == wanted:
            if seen == at:
                (os.killpg if number == signal.SIGINT else os.kill)(os.getpid(), number)
            seen += 1

    events.EventLog.emit = counting  # type: ignore[method-assign]


def descendants(mark: str) -> list[str]:
    """Command lines of the processes that were started below the job and live."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended, or is not ours
            continue
    return found


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and tell how it went."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(said.fileno(), 2)
            code = 1
            try:
                work(job)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while (alive := descendants(job["mark"])) and time.monotonic() < deadline:
            time.sleep(0.05)
        code = os.waitstatus_to_exitcode(status)
        for file in (out, said):
            file.seek(0)
        return {"code": code, "out": out.read(), "said": said.read(), "alive": alive}


def main() -> None:
    """Serve jobs until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
