"""What became of a recipe's goals, as the verbs that make a report say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def goals_of(report: Path) -> list[dict[str, Any]]:
    """The verdicts that a report's folder holds."""
    content = json.loads((report / "report.json").read_text("utf-8"))
    return list(content.get("goals", ()))


def say_goals(verdicts: list[dict[str, Any]]) -> None:
    """A line a verdict."""
    from paretron_profiling.goals import said

    for verdict in verdicts:
        typer.echo(f"goal: {said(verdict)}")
