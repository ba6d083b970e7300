"""Killed at any moment, and shared out over processes: a capture comes to the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from captureprocess import exit_codes
from paretron.artifacts.manifest import verify


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def whole(arguments: Callable[..., dict[str, Any]], tmp_path: Path) -> dict[str, bytes]:
    arguments()
    assert exit_codes(tmp_path, tmp_path / "whole") == [0]
    verify(tmp_path / "whole")
    return contents(tmp_path / "whole")


def test_kill_9_and_again_gives_the_same_bytes(whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    files = sum(name.startswith("windows-") for name in whole)
    assert files > 3
    for after in (2, files - 2):  # the second time all files are there, none is published
        assert exit_codes(tmp_path, out, killed_after=after) == [-signal.SIGKILL]
        assert not out.exists()
    assert exit_codes(tmp_path, out) == [0]
    assert contents(out) == whole


def test_two_processes_write_the_same_bytes(whole: dict[str, bytes], tmp_path: Path) -> None:
    assert exit_codes(tmp_path, tmp_path / "shared", processes=2) == [0, 0]
    assert contents(tmp_path / "shared") == whole
