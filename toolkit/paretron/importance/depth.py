"""What the loss becomes without a layer or a block of layers, the common prefix run once.

Removing the block that starts at layer i leaves layers 0 .. i-1 as they are: their hidden states
are carried along, and only what follows the block is run again for each candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from paretron.importance.executor import Batch, LayerStack, Prepared


@dataclass(frozen=True)
class RemovalLosses:
    """Mean next-token loss in nats: `baseline` with all layers, `blocks[n][i]` without the n
    layers from the i-th on."""

    baseline: float
    blocks: dict[int, tuple[float, ...]]


@torch.no_grad()
def removal_losses(
    stack: LayerStack,
    batches: Iterable[Batch],
    *,
    block_sizes: Iterable[int],
    layers: Sequence[int] | None = None,
) -> RemovalLosses:
    """Loss without every contiguous block of n layers, for every n of `block_sizes`.

    `layers` are those still in the model (all by default); blocks are contiguous in that list.
    Padding does not count. With L layers and one n, the layers run
    L + (L - n) (L - n + 1) / 2 times a batch. (Paper 1, section 2.2: PPL; paper 2: blocks.)
    """
    order = list(range(len(stack))) if layers is None else list(layers)
    sizes = sorted(set(block_sizes))
    totals = {n: [0.0] * (len(order) - n + 1) for n in sizes}
    baseline, targets = 0.0, 0
    for batch in batches:
        prepared, wanted = stack.prepare(batch.ids_BT), batch.targets()
        hidden = prepared.hidden_BTD
        for i in range(len(order) + 1):
            for n in sizes:
                if i + n <= len(order):
                    after = _run(stack, prepared, hidden, order[i + n :])
                    totals[n][i] += stack.loss_sum(after, wanted)
            if i < len(order):
                hidden = stack.run_layer(order[i], prepared, hidden)
        baseline += stack.loss_sum(hidden, wanted)
        targets += batch.num_targets
    return RemovalLosses(
        baseline / targets, {n: tuple(x / targets for x in t) for n, t in totals.items()}
    )


def greedy_removal(
    stack: LayerStack, batches: Sequence[Batch], *, rounds: int
) -> tuple[tuple[int, float], ...]:
    """Layers removed one by one, each time the one that leaves the lowest loss.

    Returns (layer, loss without it and those before it) in the order of removal; ties go to the
    lower layer.
    """
    left = list(range(len(stack)))
    removed: list[tuple[int, float]] = []
    for _ in range(rounds):
        losses = removal_losses(stack, batches, block_sizes=(1,), layers=left).blocks[1]
        best = min(range(len(left)), key=lambda k: losses[k])
        removed.append((left.pop(best), losses[best]))
    return tuple(removed)


def _run(
    stack: LayerStack, prepared: Prepared, hidden: torch.Tensor, layers: Sequence[int]
) -> torch.Tensor:
    for number in layers:
        hidden = stack.run_layer(number, prepared, hidden)
    return hidden
