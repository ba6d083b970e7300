"""SIGTERM and Ctrl-C: asked to stop, a training ends its step, saves, and says so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class StopRequest:
    """Whether somebody asked; set by a signal handler, read between steps."""

    made: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request; a second one acts as it did before.

    Handlers belong to the main thread: elsewhere nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.made = True
        restore()

    for number in _SIGNALS:
        before[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()
