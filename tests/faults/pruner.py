"""Pruning in processes that can be killed, capped and starved: the other end of pruning_worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("pruning_worker.py")


class Pruner:
    """Prunes one model in processes that can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, out: Path, **job: Any) -> int:
        """Begin on the model and the scores beside `out`, and return the process id."""
        places = {k: str(out.parent / k) for k in ("model", "scores")} | {"out": str(out)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"name": "new"} | places | job) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait, and return the exit code."""
        return int(self._line())

    def message(self) -> str:
        """What the last failed one said."""
        assert self._process.stderr is not None
        return str(json.loads(self._process.stderr.readline()))

    def close(self) -> None:
        """End the worker."""
        self._process.communicate(timeout=60)
