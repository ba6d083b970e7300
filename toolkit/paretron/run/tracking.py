"""Curves of a run for whoever asks for them: what a tracker must do, and what it may not."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol

from paretron.errors import Code, ParetronError, Problem
from paretron.run.events import Watcher

_CURVES = ("step", "eval")


class Tracker(Protocol):
    """Where figures go; any exception of it is survived."""

    name: str

    def log(self, figures: Mapping[str, float], *, tokens: int) -> None:
        """Keep figures by their tag, after so many tokens."""

    def close(self) -> None:
        """Write what is left."""


class Tracked:
    """A watcher that shows a tracker the figures of steps and evaluations, and passes all on.

    The tracker gets numbers alone, no recipe, no path and no environment. The first time that it
    fails is told in one note, and it is asked nothing more: training goes on.
    """

    def __init__(self, tracker: Tracker, *, then: Watcher) -> None:
        self._tracker = tracker
        self._then = then
        self._failed = False

    def __enter__(self) -> Tracked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._failed:
            return
        try:
            self._tracker.close()
        except Exception as error:
            self._leave_out(error, "report")

    def __call__(self, stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        """Track an event's figures, then pass the event on."""
        figures = {
            f"{stage}/{kind}/{name}": value
            for name, value in fields.items()
            if isinstance(value, float)
        }
        if kind in _CURVES and "tokens" in fields and not self._failed:
            try:
                self._tracker.log(figures, tokens=int(fields["tokens"]))
            except Exception as error:
                self._leave_out(error, stage)
        self._then(stage, kind, fields)

    def _leave_out(self, error: Exception, stage: str) -> None:
        self._failed = True
        said = " ".join(str(error).split())[:200]
        message = f"{self._tracker.name} is left out from here on: {type(error).__name__}: {said}"
        self._then(stage, "note", {"message": message})


def not_installed(package: str) -> ParetronError:
    """OPTIONAL_MISSING (exit 6) for a tracker that was asked for."""
    return ParetronError(
        Problem(
            Code.OPTIONAL_MISSING,
            f"{package} is not installed",
            where=f"--{package}",
            fix=f'pip install "paretron[{package}]"',
        )
    )
