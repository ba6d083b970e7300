"""What a training has measured so far; it travels in checkpoints, so a resumed curve is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Curves as points: the training loss of every step, the validation loss now and then."""

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens the steps so far have seen."""
        return int(self.train[-1]["tokens"]) if self.train else 0

    @property
    def tokens_of_last_step(self) -> int:
        """How many of them the last one has seen."""
        before = int(self.train[-2]["tokens"]) if len(self.train) > 1 else 0
        return self.tokens - before

    def add_step(
        self, *, tokens: int, loss: float, lr: float, grad_norm: float, parts: Mapping[str, float]
    ) -> None:
        """Append one training step; `tokens` counts all that were seen up to its end.

        `parts` are the losses of "logits" and "states" where the loss has both, before alpha, the
        "seq_len" of its windows, the "phase" where there are several, and "teacher_loss" and
        "teacher_grad_norm" of a teacher that was corrected.
        """
        step = {"tokens": tokens, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        self.train.append({**step, **parts})

    def add_validation(self, *, tokens: int, loss: float) -> None:
        """Append one validation loss, in nats a token."""
        self.validation.append({"tokens": tokens, "loss": loss})

    def validated(self, tokens: int) -> bool:
        """Whether the validation loss after this many tokens is known."""
        return bool(self.validation) and self.validation[-1]["tokens"] == tokens

    def as_json(self) -> dict[str, Any]:
        """The form in metrics.json and in checkpoints."""
        return {"train": self.train, "validation": self.validation}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """The inverse of `as_json`."""
        return cls(train=value["train"], validation=value["validation"])
