"""What was hashed once is known again, until a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from makers import PicoMaker
from paretron.artifacts.manifest import identify
from paretron.run import memory
from paretron.run.memory import input_identity, remembered


def test_computed_again_only_when_a_file_has_changed(tmp_path: Path) -> None:
    file, made = tmp_path / "x", []

    def compute() -> str:
        made.append(file.read_text())
        return made[-1]

    file.write_text("one")
    for _ in range(3):
        assert remembered(tmp_path / "m.json", "x", [file], compute) == "one"
    assert made == ["one"]
    times = file.stat()
    file.write_text("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # its age is hidden
    assert remembered(tmp_path / "m.json", "x", [file], compute) == "two"
    for broken in ("{broken", "[]", '{"x": 1}', '{"x": {}}'):
        (tmp_path / "m.json").write_text(broken)
        assert remembered(tmp_path / "m.json", "x", [file], compute) == "two"
    assert made == ["one", *["two"] * 5]


def test_a_large_input_is_read_once_a_small_one_each_time(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = pico(), tmp_path / "cache"
    monkeypatch.setenv("PARETRON_CACHE", str(cache))
    found = input_identity(model)
    assert found == identify(model)
    assert not cache.exists()
    monkeypatch.setattr(memory, "_QUICKLY_READ_BYTES", 1000)
    assert input_identity(model) == found
    monkeypatch.setattr(memory, "identify", lambda _: pytest.fail("read again"))
    assert input_identity(model) == found
    assert list(cache.iterdir()) == [cache / "inputs.json"]


def test_a_cache_that_cannot_be_written_only_costs_time(
    pico: PicoMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETRON_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(memory, "_QUICKLY_READ_BYTES", 1000)
    assert input_identity(model) == identify(model)
