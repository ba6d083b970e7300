"""Work done on a background thread, so that reading, writing and hashing overlap."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Made(Generic[Item]):
    item: Item


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def read_ahead(items: Iterator[Item], *, depth: int = 3) -> Iterator[Item]:
    """Yield the items in order, made on a thread that is at most `depth` ahead.

    Its error is raised where the missing item would have come. Leaving early stops the thread.
    """
    ready: queue.Queue[_Made[Item] | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(value: _Made[Item] | _End) -> None:
        while not stop.is_set():
            try:
                ready.put(value, timeout=0.1)
            except queue.Full:
                continue
            return

    def run() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if stop.is_set():
                    return
                put(_Made(item))
        except BaseException as raised:  # carried over to the thread that waits
            error = raised
        put(_End(error))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(value := ready.get(), _End):
            yield value.item
            del value  # nothing is held here while the next one is awaited
        if value.error is not None:
            raise value.error
    finally:
        stop.set()
        thread.join()


def in_background(work: Callable[[], Item]) -> Callable[[], Item]:
    """Start `work` on a thread; the function returned waits for its result, or raises its error.

    A program that ends does not wait for it.
    """
    found: list[_Made[Item] | _End] = []

    def run() -> None:
        try:
            found.append(_Made(work()))
        except BaseException as raised:  # carried over to the thread that waits
            found.append(_End(raised))

    thread = threading.Thread(target=run, name="background", daemon=True)
    thread.start()

    def result() -> Item:
        thread.join()
        (value,) = found
        if isinstance(value, _Made):
            return value.item
        assert value.error is not None  # an end without one comes from read_ahead alone
        raise value.error

    return result
