"""events.jsonl: what happened when, appended as it happens; and the same to whoever watches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Watcher = Callable[[str, str, Mapping[str, Any]], None]  # (stage, kind, fields)
OnEvent = Callable[[str, Mapping[str, Any]], None]  # (kind, fields)


class EventLog:
    """An append-only log of one line of JSON an event; progress goes to the watcher alone."""

    def __init__(self, path: Path, *, watcher: Watcher | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._watcher = watcher

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def emit(self, stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        """Log an event of a stage with the time it happened."""
        if self._watcher is not None:
            self._watcher(stage, kind, fields)
        if kind == "progress":
            return
        line = {"time": round(time.time(), 3), "stage": stage, "kind": kind} | _finite(fields)
        self._file.write(json.dumps(line, default=str) + "\n")
        self._file.flush()

    def of(self, stage: str) -> OnEvent:
        """The callback that a stage reports through."""
        return lambda kind, fields: self.emit(stage, kind, fields)


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: null stands for a figure that is absent."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()
    }
