"""Curves of a run in Trackio: on this machine, unless its own environment names a server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from paretron.run.tracking import not_installed


class Trackio:
    """A tracker that logs to a project; its run begins with the first figures."""

    name = "trackio"

    def __init__(self, project: str) -> None:
        """OPTIONAL_MISSING (exit 6) when trackio is not installed."""
        try:
            with redirect_stdout(sys.stderr):  # standard output is for what a verb says
                import trackio
        except ImportError as error:
            raise not_installed(self.name) from error
        self._trackio, self._project = trackio, project
        self._run: Any = None

    def log(self, figures: Mapping[str, float], *, tokens: int) -> None:
        """All figures of an event at once; `tokens` is their axis."""
        with redirect_stdout(sys.stderr):
            if self._run is None:
                # Figures alone: nothing of the machine, and no page in a notebook.
                self._run = self._trackio.init(
                    project=self._project, embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
            self._run.log(dict(figures), step=tokens)

    def close(self) -> None:
        """Write what is left."""
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._trackio.finish()  # of the run itself it would be done and told again at exit
