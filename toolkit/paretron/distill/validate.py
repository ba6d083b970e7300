"""The language-model loss on held-out windows while a student trains."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule

from paretron.distill.batches import Windows
from paretron.distill.objective import Objective
from paretron.workers.world import World


@torch.no_grad()
def validation_loss(
    objective: Objective, windows: Windows, *, micro_batch: int, world: World
) -> float:
    """Mean cross entropy in nats a token over all windows, shared among the processes."""
    loss, valid = 0.0, 0
    for start in range(0, len(windows), micro_batch * world.shares):
        first = start + world.share * micro_batch
        ids = range(first, min(first + micro_batch, len(windows)))
        # Sharded layers are gathered together, so a process without windows runs along.
        batch = windows.batch(ids) if ids else windows.batch([0]).ignored()
        valid += batch.valid
        batch = batch.to(world.device)
        total, _ = objective(batch, None, 1.0)
        loss += float(total)
    if isinstance(objective, FSDPModule):
        # Only a backward pass would do it; a checkpoint finds moments by the parts of weights.
        objective.reshard()
    total_loss, total_valid = world.total(loss, valid)
    return total_loss / total_valid
