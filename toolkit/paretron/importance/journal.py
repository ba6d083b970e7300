"""Values of removed layers, appended as they come: what a killed process need not do again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class Journal:
    """A file of JSON lines: what the values depend on, then one removal and its value a line.

    A line that a killed process left half written is dropped; a file that was written for other
    settings is begun anew.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"settings": settings}, sort_keys=True)
        lines = _whole_lines(path)
        if lines[:1] != [head]:
            lines = [head]
        self.values = {
            tuple(entry["without"]): float(entry["value"]) for entry in map(json.loads, lines[1:])
        }
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        os.replace(unfinished, path)
        self._path = path

    def add(self, removed: Sequence[int], value: float) -> None:
        """Append a value; it survives the death of this process from here on."""
        line = json.dumps({"without": list(removed), "value": value})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    *whole, _rest = path.read_text("utf-8", "replace").split("\n")
    return whole
