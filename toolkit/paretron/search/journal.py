"""Results as they come: one line of JSON each, so that a killed search goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem


class Journal:
    """An append-only file of (step, key) -> figures; the first line says what it belongs to."""

    def __init__(self, path: Path, *, of: Mapping[str, Any]) -> None:
        """Open the journal of a search with these settings, or start it.

        A last line that was cut is dropped. RUN_MISMATCH for the journal of another search.
        """
        self._path = path
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(of))
        lines = _whole_lines(path)
        if not lines:
            self._append({"search": mine})
        elif lines[0] != {"search": mine}:
            raise ParetronError(
                Problem(
                    Code.RUN_MISMATCH,
                    "results of a search with other settings",
                    where=str(path),
                    fix=f"remove {path.parent} to search anew",
                )
            )
        for line in lines[1:]:
            self._known[line["step"], line["key"]] = line["figures"]

    def get(self, step: str, key: str) -> dict[str, Any] | None:
        """The figures of a candidate's step; None when it has not been done."""
        return self._known.get((step, key))

    def add(self, step: str, key: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Append figures so that they outlive this process, and return them as read back."""
        line = {"step": step, "key": key, "figures": dict(figures)}
        self._append(line)
        kept: dict[str, Any] = json.loads(json.dumps(line))["figures"]
        self._known[step, key] = kept
        return kept

    def _append(self, line: Mapping[str, Any]) -> None:
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
