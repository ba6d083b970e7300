"""Curves of a run in Weights & Biases, as its own environment (WANDB_MODE, ...) is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretron.run.tracking import not_installed


class Wandb:
    """A tracker that logs to a project; its run begins with the first figures."""

    name = "wandb"

    def __init__(self, project: str) -> None:
        """OPTIONAL_MISSING (exit 6) when wandb is not installed."""
        try:
            import wandb
        except ImportError as error:
            raise not_installed(self.name) from error
        self._wandb, self._project = wandb, project
        self._run: Any = None

    def log(self, figures: Mapping[str, float], *, tokens: int) -> None:
        """All figures of an event at once; `tokens` is their axis."""
        if self._run is None:
            # Figures alone: not the code, the command line, the machine or what is printed.
            settings = self._wandb.Settings(
                console="off", disable_code=True, disable_git=True, save_code=False, silent=True,
                x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True,
                x_save_requirements=False,
            )  # fmt: skip
            self._run = self._wandb.init(project=self._project, settings=settings)
            self._run.define_metric("*", step_metric="tokens")
        self._run.log({**figures, "tokens": tokens})

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()
