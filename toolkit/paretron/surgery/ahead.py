"""Work done ahead on one background thread, so that reading and writing overlap."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Done(Generic[Item, Result]):
    item: Item
    result: Result


@dataclass(frozen=True)
class _End:
    error: BaseException | None


def read_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], *, depth: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, work(item)) in order, computed on a thread that is at most `depth` ahead.

    Its error is raised where the missing result would have come. Leaving early stops the thread.
    """
    ready: queue.Queue[_Done[Item, Result] | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(value: _Done[Item, Result] | _End) -> None:
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
                put(_Done(item, work(item)))
        except BaseException as raised:  # carried over to the thread that waits
            error = raised
        put(_End(error))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(value := ready.get(), _End):
            yield value.item, value.result
        if value.error is not None:
            raise value.error
    finally:
        stop.set()
        thread.join()
