"""Trainings in processes that can be killed; a module of its own: a child imports it by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

from paretron.artifacts.manifest import verify
from paretron.distill import worker
from paretron.distill.job import Job

_SAVING = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def exit_with(job_file: Path, pipe: Path, fault: Mapping[str, int]) -> None:
    """Train, and leave with the worker's exit code, or as the fault wants it.

    `kill_at`: SIGKILL at the so-manyth change of files of checkpoints. `largest_file`: no file may
    have more bytes.
    """
    if "kill_at" in fault:
        _kill_at(fault["kill_at"])
    if "largest_file" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["largest_file"],) * 2)
    raise SystemExit(worker.main(job_file, pipe))


def _kill_at(number: int) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _SAVING and "step-" in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@contextmanager
def training(
    given: dict[str, Any], folder: Path, **fault: int
) -> Iterator[tuple[BaseProcess, TextIO]]:
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
        process = context.Process(target=exit_with, args=(job_file, pipe, fault))
        process.start()
        try:
            yield process, events
        finally:
            process.kill()
            process.join()


def messages(process: BaseProcess, events: TextIO) -> Iterator[dict[str, Any]]:
    """What a training says until it ends."""
    rest = b""
    while True:
        alive = process.is_alive()  # what it wrote before it ended is read below
        while select.select([events], [], [], 0)[0]:
            rest += os.read(events.fileno(), 1 << 16)
        *lines, rest = rest.split(b"\n")
        yield from map(json.loads, lines)
        if not alive:
            return
        process.join(0.02)


def end_of(given: dict[str, Any], folder: Path, **fault: int) -> tuple[int, list[dict[str, Any]]]:
    """Let a training run to its end: the exit code, and all that it said."""
    with training(given, folder, **fault) as (process, events):
        said = list(messages(process, events))
        process.join()
        assert process.exitcode is not None
        return process.exitcode, said


def signal_at(
    given: dict[str, Any],
    folder: Path,
    wanted: Callable[[dict[str, Any]], bool],
    number: signal.Signals,
) -> tuple[int, list[dict[str, Any]]]:
    """Send a signal at the first message that is wanted; the exit code, and all that was said."""
    said, sent = [], False
    with training(given, folder) as (process, events):
        for message in messages(process, events):
            said.append(message)
            if not sent and wanted(message):
                assert process.pid is not None
                os.kill(process.pid, number)
                sent = True
        process.join()
        assert process.exitcode is not None
        return process.exitcode, said


def content(out: Path) -> dict[str, str]:
    """The verified files of an artifact, by name."""
    return {name: file["sha256"] for name, file in verify(out)["files"].items()}


def elsewhere(given: dict[str, Any], name: str) -> dict[str, Any]:
    """The same training with an output and a state of another name."""
    return given | {
        "out": given["out"].with_name(name),
        "state": given["state"].with_name(f"{name}-state"),
    }
