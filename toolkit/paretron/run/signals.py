"""SIGTERM and Ctrl-C become one exception, so that every stage can put its work away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from paretron.errors import Code, ParetronError, Problem


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt inside, and that into INTERRUPTED (exit 75) outside."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    except KeyboardInterrupt as error:
        raise ParetronError(
            Problem(Code.INTERRUPTED, "stopped on request", fix="the same command continues")
        ) from error
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
