"""Results as they come, one line of JSON each: what a killed process need not do again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem

Key = tuple[str | int, ...]  # what was done
Figures = Mapping[str, Any]  # what came of it, as JSON holds it


class Journal:
    """An append-only file of key -> figures; the first line says what they depend on.

    `known` is what it holds.
    """

    def __init__(self, path: Path, *, of: Figures, start_over: bool = False) -> None:
        """Open the journal of these settings, or begin it.

        A last line that was cut is dropped. RUN_MISMATCH for the journal of other settings, which
        is dropped with `start_over`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.known: dict[Key, Figures] = {}
        head = {"of": json.loads(json.dumps(of))}
        lines = _whole_lines(path)
        if lines and lines[0] != head:
            if not start_over:
                raise ParetronError(
                    Problem(
                        Code.RUN_MISMATCH,
                        "results of other settings",
                        where=str(path),
                        fix=f"remove {path.parent} to begin anew",
                    )
                )
            path.unlink()
            lines = []
        if not lines:
            self._append(head)
        for line in lines[1:]:
            self.known[tuple(line["key"])] = line["figures"]

    def add(self, key: Key, figures: Figures) -> Figures:
        """Append figures so that they outlive this process, and return them as read back."""
        line = {"key": list(key), "figures": dict(figures)}
        self._append(line)
        self.known[key] = json.loads(json.dumps(line))["figures"]
        return self.known[key]

    def _append(self, line: Figures) -> None:
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")
            f.flush()
            os.fsync(f.fileno())


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole; what comes after them is cut off."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]
