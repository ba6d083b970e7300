"""Curves of a run in TensorBoard's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paretron.run.tracking import not_installed


class TensorBoard:
    """A tracker that writes event files into a folder."""

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        """OPTIONAL_MISSING (exit 6) when tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise not_installed(self.name) from error
        self._writer = SummaryWriter(str(folder))

    def log(self, figures: Mapping[str, float], *, tokens: int) -> None:
        """One scalar a figure."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, global_step=tokens)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
