"""Several processes on this machine: torchrun as a child, its workers' events as our own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paretron
from paretron.errors import ParetronError, Problem
from paretron.workers.relay import problem_from
from paretron.workers.stop import StopRequest, stop_requests

OnEvent = Callable[[str, Mapping[str, object]], None]  # (kind, fields)

_POLL_S = 0.1
_LOG_TAIL_CHARS = 2000


def under_torchrun() -> bool:
    """Whether this process is one of a group that somebody launched already."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def process_rank() -> int:
    """The number of this process in the group that somebody launched; 0 for one alone."""
    return int(os.environ.get("RANK", "0"))


def launch(
    worker: str, job: str, *, processes: int, died: Problem, hands_on_stop: bool, on_event: OnEvent
) -> None:
    """Run `python -m WORKER JOB_FILE PIPE` in so many processes and wait; `job` is the file's text.

    With `hands_on_stop`, a request to stop is passed on to the leading worker, who ends in its own
    time; else it acts here. Whatever happens, no process is left. Errors: those of the workers;
    `died`, with the reason before it, when one of them was killed.
    """
    with tempfile.TemporaryDirectory(prefix="paretron-") as name, _pipe(Path(name)) as pipe:
        folder = Path(name)
        (folder / "job.json").write_text(job, "utf-8")
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                _command(worker, processes, folder),
                env=_environment(processes),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # A Ctrl-C goes to us alone, who pass it on.
                start_new_session=True,
            )
        try:
            stop = stop_requests() if hands_on_stop else contextlib.nullcontext(StopRequest())
            with stop as request:
                story = _watch(process, pipe, request, on_event)
        finally:
            if process.poll() is None:
                process.kill()  # the workers die with it
            process.wait()
        if process.returncode:
            raise error_of(story, process.returncode, log.read_text("utf-8", "replace"), died)


@dataclass
class Story:
    """What the workers said besides events."""

    leader_pid: int | None = None
    problems: list[Problem] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # what the others said of a dead one
    ranks: dict[Problem, set[int]] = field(default_factory=dict)  # who reported a problem

    def hear(self, message: Mapping[str, Any]) -> None:
        """Take in one message that is no event."""
        if "pid" in message:
            self.leader_pid = int(message["pid"])
        elif "problem" in message:
            problem = problem_from(message["problem"])
            if problem not in self.problems:  # every rank may report the same one
                self.problems.append(problem)
            self.ranks.setdefault(problem, set()).add(int(message["rank"]))
        else:
            said = self.lost if message["peer_lost"] else self.failures
            said.append(f"on rank {message['rank']}:\n{message['failure']}")


def _watch(
    process: subprocess.Popen[bytes], pipe: int, stop: StopRequest, on_event: OnEvent
) -> Story:
    story, rest, passed_on = Story(), b"", False
    running = True
    while running:
        running = process.poll() is None  # what it wrote before it ended is read below
        while select.select([pipe], [], [], _POLL_S if running else 0)[0]:
            *lines, rest = (rest + os.read(pipe, 1 << 16)).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "event" in message:
                    on_event(message["event"], message["fields"])
                else:
                    story.hear(message)
            if stop.made:
                break
        if stop.made and not passed_on and story.leader_pid is not None:
            passed_on = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(story.leader_pid, signal.SIGTERM)
    return story


def error_of(story: Story, returncode: int, log: str, died: Problem) -> Exception:
    """What to raise when torchrun ended with an error."""
    if story.problems:
        return ParetronError(*[_told_of(p, story.ranks.get(p, {0})) for p in story.problems])
    killed = [line.strip() for line in log.splitlines() if "Signal" in line]
    if story.failures or not killed:
        ended = f"torchrun ended with {returncode}\n{log[-_LOG_TAIL_CHARS:]}"
        return RuntimeError([*story.failures, *story.lost, ended][0])
    return ParetronError(dataclasses.replace(died, cause=f"{died.cause}: {killed[0][:200]}"))


def _told_of(problem: Problem, ranks: set[int]) -> Problem:
    """A problem with the rank that met it, unless the leading one did, who speaks for all."""
    if 0 in ranks:
        return problem
    return dataclasses.replace(problem, cause=f"on rank {min(ranks)}: {problem.cause}")


def _command(worker: str, processes: int, folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes),
        "-m", worker, str(folder / "job.json"), str(folder / "events"),
    ]  # fmt: skip


def _environment(processes: int) -> dict[str, str]:
    root = str(Path(paretron.__file__).parents[1])  # found even where it is not installed
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # all processes are on this machine
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }


@contextlib.contextmanager
def _pipe(folder: Path) -> Iterator[int]:
    os.mkfifo(folder / "events")
    # Open for both, so that it never reads as ended while a worker has yet to open it.
    pipe = os.open(folder / "events", os.O_RDWR | os.O_NONBLOCK)
    try:
        yield pipe
    finally:
        os.close(pipe)
