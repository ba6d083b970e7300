"""A child process that answers JSON lines, and never outlives its use."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

LOG_LINES = 20
GRACE_S = 5.0


class WorkerFailed(Exception):
    """The child ended, stayed silent too long, or answered nonsense; says so with its log's end."""


class Worker:
    """A process in its own group: requests on its standard input, answers on a pipe of their own.

    Its command gets two more arguments: the number of the answers' file descriptor, and
    `argument`. What it prints goes to the log file. `grace_s` is how long it may take to end.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        argument: str,
        environment: Mapping[str, str],
        log: Path,
        grace_s: float | None = None,
    ) -> None:
        self._log, self._grace_s = log, grace_s
        self._answers, theirs = os.pipe()
        try:
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    [*command, str(theirs), argument],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(environment),
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._answers)
            raise
        finally:
            os.close(theirs)
        self._buffer = b""

    @property
    def pid(self) -> int:
        """The process id, and the id of its group."""
        return self._process.pid

    def ask(self, request: object, *, timeout_s: float) -> dict[str, Any]:
        """Send a request (None: send nothing) and wait for the next answer."""
        if request is not None:
            stdin = self._process.stdin
            if stdin is None:
                raise RuntimeError("the worker was started without standard input")
            try:
                stdin.write(json.dumps(request).encode() + b"\n")
                stdin.flush()
            except BrokenPipeError as error:
                raise self._failure() from error
        line = self._read_line(monotonic() + timeout_s)
        if line is None:
            raise WorkerFailed(f"gave no answer for {timeout_s:.0f} s{self._log_end()}")
        try:
            return dict(json.loads(line))
        except ValueError as error:
            raise WorkerFailed(f"answered {line[:80]!r}{self._log_end()}") from error

    def end(self) -> None:
        """Close its input, which ends it, then kill whatever is left of its group."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S if self._grace_s is None else self._grace_s)
        with suppress(ProcessLookupError, PermissionError):  # the group is empty
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1

    def _read_line(self, deadline: float) -> bytes | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - monotonic())):
                    return None
                read = os.read(self._answers, 1 << 16)
                if not read:
                    raise self._failure()
                self._buffer += read
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _failure(self) -> WorkerFailed:
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return WorkerFailed(f"closed its answers{self._log_end()}")
        how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
        return WorkerFailed(f"{how}{self._log_end()}")

    def _log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "".join(f"\n    | {line[:300]}" for line in lines)
