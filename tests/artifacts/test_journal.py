"""A journal keeps what was written whole, for the settings that it was written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretron.artifacts.journal import Journal
from paretron.errors import Code, ParetronError


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "journal.jsonl"
    journal = Journal(path, of={"seed": 1, "sizes": (2, 3)})
    assert journal.add((2, 3), {"value": 0.5}) == {"value": 0.5}
    journal.add(("rank", "a"), {"loss": None, "failed": "the loss is nan"})
    again = Journal(path, of={"seed": 1, "sizes": [2, 3]})
    assert again.known == journal.known
    assert again.known[2, 3] == {"value": 0.5}


@pytest.mark.parametrize("cut", ['{"key": [4], "fig', '{"key": [4], "figures": {}}'])
def test_a_line_that_was_cut_is_dropped_once(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, of={}).add((1,), {"value": 1})
    with path.open("a") as f:
        f.write(cut)  # no end of line: the process was killed within it
    journal = Journal(path, of={})
    assert set(journal.known) == {(1,)}
    journal.add((2,), {"value": 2})
    assert set(Journal(path, of={}).known) == {(1,), (2,)}


def test_a_journal_belongs_to_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, of={"seed": 1}).add((1,), {"value": 1})
    with pytest.raises(ParetronError) as caught:
        Journal(path, of={"seed": 2})
    assert caught.value.problems[0].code is Code.RUN_MISMATCH
    assert set(Journal(path, of={"seed": 1}).known) == {(1,)}  # nothing was lost
    assert not Journal(path, of={"seed": 2}, start_over=True).known
    with pytest.raises(ParetronError):
        Journal(path, of={"seed": 1})


def test_a_figure_that_json_cannot_hold_is_no_figure(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", of={})
    with pytest.raises(ValueError, match="JSON"):
        journal.add((1,), {"loss": float("nan")})
    assert not journal.known
