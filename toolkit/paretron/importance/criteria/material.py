"""What a criterion is given and what it returns; which function belongs to which name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from paretron.artifacts.reader import Checkpoint
from paretron.importance.executor import Batch, LayerStack
from paretron.importance.states import HiddenStates


@dataclass(frozen=True)
class Material:
    """A checkpoint, its layers as they are run, and the samples of this process.

    `total` adds the sums of all processes; `states` says where hidden states of a streamed model
    wait.
    """

    checkpoint: Checkpoint
    stack: LayerStack
    batches: Sequence[Batch]
    seed: int = 0
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    states: Callable[[], HiddenStates] = HiddenStates


@dataclass(frozen=True)
class Importance:
    """What a criterion says, fp64: the higher, the more important.

    `units` are [places, units] by axis, in the order in which activations of the axis are observed;
    "hidden" has one place. Without "kv_heads" a KV group counts as the sum of its query heads.
    `layers` [L] are whole layers; None where the criterion knows none.
    """

    units: Mapping[str, torch.Tensor]
    layers: torch.Tensor | None = None
