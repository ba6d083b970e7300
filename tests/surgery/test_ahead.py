"""Reading ahead: in order, a little ahead, errors passed on, nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from paretron.surgery.ahead import in_background, read_ahead


def test_items_come_in_order() -> None:
    assert list(read_ahead(k * k for k in range(50))) == [k * k for k in range(50)]


def test_never_more_than_asked_ahead() -> None:
    furthest = 0
    started: list[int] = []

    def items() -> Iterator[int]:
        for k in range(30):
            started.append(k)
            yield k

    for k in read_ahead(items(), depth=2):
        time.sleep(0.002)
        furthest = max(furthest, len(started) - (k + 1))
    assert 1 <= furthest <= 3  # two that are ready and one being made


def test_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("three")

    seen = []
    with pytest.raises(ValueError, match="three"):
        for item in read_ahead(items()):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_leaving_early_stops_the_thread() -> None:
    for item in read_ahead(count()):
        if item == 5:
            break
    deadline = time.monotonic() + 5
    while any(t.name == "read-ahead" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_work_in_the_background_is_waited_for_when_it_is_asked_for() -> None:
    go = threading.Event()
    result = in_background(lambda: go.wait() and 7)
    go.set()
    assert result() == 7
    assert result() == 7


def test_an_error_in_the_background_is_raised_when_it_is_asked_for() -> None:
    def fail() -> int:
        raise ValueError("late")

    result = in_background(fail)
    with pytest.raises(ValueError, match="late"):
        result()
