"""Reading ahead: in order, a little ahead, errors passed on, nothing left running."""

from __future__ import annotations

import threading
import time

import pytest

from paretron.surgery.ahead import read_ahead


def test_results_come_in_order() -> None:
    assert list(read_ahead(lambda k: k * k, range(50))) == [(k, k * k) for k in range(50)]


def test_never_more_than_asked_ahead() -> None:
    taken, furthest = 0, 0
    started: list[int] = []
    for item, _ in read_ahead(started.append, range(30), depth=2):
        taken = item + 1
        time.sleep(0.002)
        furthest = max(furthest, len(started) - taken)
    assert furthest <= 3  # two that are ready and one being made


def test_error_comes_where_its_result_would_have() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    seen = []
    with pytest.raises(ValueError, match="three"):
        for item, _ in read_ahead(work, range(10)):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_leaving_early_stops_the_thread() -> None:
    for item, _ in read_ahead(lambda k: k, range(10**9)):
        if item == 5:
            break
    deadline = time.monotonic() + 5
    while any(t.name == "read-ahead" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
