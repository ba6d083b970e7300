"""Progress of a run: a bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from paretron.cli.output import say_notices, seconds_text

if TYPE_CHECKING:
    from rich.progress import TaskID

    from paretron.plan.plan import Plan

PLAIN_EVERY_S = 10.0


class Progress:
    """Shows events as they come; called with (stage, kind, fields)."""

    def __init__(self, plan: Plan | None, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self.notices: list[str] = []  # what was left out of an input
        self._live = self._console.is_terminal and not quiet
        self._bars = Bars(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._total = _count(plan) if plan is not None else 0
        self._number = 0
        self._started = self._said = 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._bars.stop()

    def of(self, stage: str) -> Callable[[str, Mapping[str, Any]], None]:
        """The callback of a verb that runs one stage alone."""
        return lambda kind, fields: self(stage, kind, fields)

    def __call__(self, stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        """Show one event; a notice also when all else is quiet."""
        if kind == "notice":
            self.notices.append(fields["message"])
            say_notices([fields["message"]])
        if self._quiet:
            return
        match kind:
            case "started" | "reused":
                self._start(stage, kind)
            case "finished":
                self._finish(stage)
            case "failed":
                self._line(f"{stage}: failed")
            case "notice":
                pass
            case "note":
                self._line(f"{stage}: {fields['message']}")
            case "task":
                again = ", from before" if fields["reused"] else ""
                figure = f"{fields['task']} {fields['metric']} {fields['value']:.4f}"
                self._line(f"{stage}: {figure}{again}")
            case _:
                self._advance(stage, fields)

    def _start(self, stage: str, kind: str) -> None:
        self._number += 1
        self._started = self._said = time.monotonic()
        label = f"[{self._number}/{self._total}] {stage}" if self._total else stage
        if kind == "reused":
            self._line(f"{label}: reused")
        elif self._live:
            self._task = self._bars.add_task(label, total=None, detail="")
        else:
            self._line(label)

    def _finish(self, stage: str) -> None:
        took = seconds_text(time.monotonic() - self._started)
        if self._live and self._task is not None:
            self._bars.update(self._task, total=1, completed=1, detail="done")
            self._bars.stop_task(self._task)
        else:
            self._line(f"{stage}: done in {took}")

    def _advance(self, stage: str, fields: Mapping[str, Any]) -> None:
        detail = _detail(fields)
        if self._live and self._task is not None:
            if "total" in fields:
                self._bars.update(self._task, total=fields["total"], completed=fields["done"])
            self._bars.update(self._task, detail=detail)
        elif detail and time.monotonic() - self._said > PLAIN_EVERY_S:
            self._said = time.monotonic()
            self._line(f"{stage}: {detail}")

    def _line(self, text: str) -> None:
        if self._live:
            self._console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _detail(fields: Mapping[str, Any]) -> str:
    """The figures of an event worth a line: loss, speed, what is left."""
    parts = []
    if "done" in fields and "total" in fields:
        parts.append(f"{fields['done']}/{fields['total']} {fields.get('unit', '')}".strip())
    if isinstance(fields.get("step"), int):
        parts.append(f"step {fields['step']}")
    if isinstance(fields.get("loss"), float):
        parts.append(f"loss {fields['loss']:.3f}")
    if isinstance(fields.get("tokens_per_s"), int | float):
        parts.append(f"{fields['tokens_per_s']:.0f} tok/s")
    if isinstance(fields.get("output_tok_s"), int | float):
        parts.append(f"{fields['engine']} {fields['model']} {fields['output_tok_s']:.0f} tok/s")
    if isinstance(fields.get("eta_s"), int | float):
        parts.append(f"{seconds_text(fields['eta_s'])} left")
    return ", ".join(parts)


def _count(plan: Plan) -> int:
    """The stages that will show: a given teacher is none."""
    return len(plan.stages) - (plan.recipe.teacher.model is not None)
