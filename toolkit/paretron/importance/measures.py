"""What a removal is judged by: sums over batches of the last layer's output, then one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paretron.importance.executor import Batch, LayerStack


class Measure(Protocol):
    """A figure of a model whose parts over batches, and over processes, add up."""

    @property
    def batches(self) -> Sequence[Batch]:
        """What this process runs."""
        ...

    def nothing(self) -> torch.Tensor:
        """The sums over no batch, fp64."""
        ...

    def part(self, stack: LayerStack, hidden_BTD: torch.Tensor, batch: int) -> torch.Tensor:
        """What a batch adds to the sums; the head must be loaded."""
        ...

    def value(self, sums: torch.Tensor) -> float:
        """The figure from the sums over all batches of all processes."""
        ...

    def cost(self, value: float) -> float:
        """What is lower for a better value."""
        ...


@dataclass(frozen=True)
class LossMeasure:
    """Mean next-token loss in nats; padding does not count."""

    batches: Sequence[Batch]

    def nothing(self) -> torch.Tensor:
        """No loss, no target."""
        return torch.zeros(2, dtype=torch.float64)

    def part(self, stack: LayerStack, hidden_BTD: torch.Tensor, batch: int) -> torch.Tensor:
        """Summed loss and number of targets."""
        some = self.batches[batch]
        loss = stack.loss_sum(hidden_BTD, some.targets())
        return torch.tensor([loss, some.num_targets], dtype=torch.float64)

    def value(self, sums: torch.Tensor) -> float:
        """Loss a target."""
        return float(sums[0] / sums[1])

    def cost(self, value: float) -> float:
        """The loss itself."""
        return value
