"""Curves of a run in TensorBoard's form, for whoever asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.run.events import Watcher


class TensorBoard:
    """A watcher that writes the figures of steps and evaluations, and passes every event on."""

    def __init__(self, folder: Path, *, then: Watcher) -> None:
        """OPTIONAL_MISSING (exit 6) when tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ParetronError(
                Problem(
                    Code.OPTIONAL_MISSING,
                    "tensorboard is not installed",
                    where="--tensorboard",
                    fix='pip install "paretron[tensorboard]"',
                )
            ) from error
        self._writer = SummaryWriter(str(folder))
        self._then = then

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    def __call__(self, stage: str, kind: str, fields: Mapping[str, Any]) -> None:
        """Write a step's or an evaluation's figures against the tokens seen."""
        if kind in ("step", "eval"):
            for name, value in fields.items():
                if isinstance(value, float):
                    tag = f"{stage}/{kind}/{name}"
                    self._writer.add_scalar(tag, value, global_step=int(fields["tokens"]))
        self._then(stage, kind, fields)
