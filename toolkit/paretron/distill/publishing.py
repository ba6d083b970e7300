"""What a training publishes: gathered on the leading process, written as a repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from paretron.artifacts.held import held_parameters
from paretron.artifacts.models import save_model
from paretron.artifacts.reader import Checkpoint
from paretron.distill.adapters import adapters_of, check_merged, merged_parameters
from paretron.distill.batches import Batch
from paretron.recipe import Correct, Training
from paretron.workers.world import World

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A model's weights after its training, in the dtypes of the `source` that it began as.

    On the CPU of the leading process; there is nothing on the others. The `adapters` are in the
    weights already.
    """

    source: Checkpoint
    settings: Training
    weights: Mapping[str, Tensor]
    adapters: Mapping[str, Tensor]

    @classmethod
    def gather(
        cls, model: PreTrainedModel, source: Path, settings: Training, world: World
    ) -> Trained:
        """Bring all parts together; a collective call where they are sharded."""
        began = Checkpoint.open(source)
        first = {h.name: h.parts[0][0] for h in held_parameters(began.family, began.config)}
        weights: dict[str, Tensor] = {}
        for name, gathered in merged_parameters(model, settings):
            if world.leads:
                dtype = _TORCH_DTYPES[began.entries[first[name]].dtype]
                weights[name] = gathered.to(device="cpu", dtype=dtype)
        return cls(began, settings, weights, adapters_of(model))

    def write(self, folder: Path, *, batch: Batch) -> None:
        """Write the repository into a folder that is there. GATE_PARITY: by adapters, not merged.

        `batch` is what merged adapters are compared on.
        """
        source = self.source.path
        save_model(self.weights, folder, config=self.source.config, companions=source)
        if isinstance(self.settings, Correct) and self.adapters:
            check_merged(folder, source, self.settings, self.adapters, batch)
