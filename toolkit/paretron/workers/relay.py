"""What worker processes tell their parent: lines of JSON through a named pipe.

Every process may write; a line is short enough for the pipe to keep it whole. When the parent is
gone, writing fails, and so the workers end too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem

_ATOMIC_BYTES = 4096  # PIPE_BUF on Linux
_MESSAGE_CHARS = 600
_TRACEBACK_CHARS = 2000


class RelayWriter:
    """A worker's end of the pipe."""

    def __init__(self, path: Path, *, rank: int) -> None:
        # Without O_NONBLOCK this would wait for a parent that may have died already.
        self._pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(self._pipe, True)
        self._rank = rank

    def pid(self) -> None:
        """Say where requests to stop are to be sent."""
        self._send({"pid": os.getpid()})

    def event(self, kind: str, fields: Mapping[str, object]) -> None:
        """Pass on an event."""
        self._send({"event": kind, "fields": dict(fields)})

    def problems(self, error: ParetronError) -> None:
        """Pass on a user's problems, each in a line of its own."""
        for problem in error.problems:
            texts = dataclasses.replace(
                problem,
                cause=problem.cause[:_MESSAGE_CHARS],
                where=problem.where[:_MESSAGE_CHARS],
                fix=problem.fix[:_MESSAGE_CHARS],
            )
            self._send({"problem": texts.as_json()})

    def failure(self, error: BaseException) -> None:
        """Pass on an exception that nobody foresaw, or that a lost peer caused."""
        text = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]
        self._send({"failure": text, "peer_lost": _peer_lost(error)})

    def _send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps({"rank": self._rank, **message}).encode() + b"\n"
        os.write(
            self._pipe, line[: _ATOMIC_BYTES - 1] + b"\n" if len(line) > _ATOMIC_BYTES else line
        )


def problem_from(fields: Mapping[str, str]) -> Problem:
    """The problem that `RelayWriter.problems` sent."""
    return Problem(Code(fields["code"]), fields["cause"], fields["where"], fields["fix"])


def _peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone: it has no story of its own."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
