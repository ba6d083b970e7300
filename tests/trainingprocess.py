"""What a child process runs; a module of its own, so that the child can import it by name."""

from __future__ import annotations

from pathlib import Path

from paretron.distill import worker


def exit_with(job_file: Path, pipe: Path) -> None:
    """Train, and leave with the worker's exit code."""
    raise SystemExit(worker.main(job_file, pipe))
