"""The vocabulary that a loss sums over: all of it in this process, or its own rows in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class Vocabulary:
    """All tokens, here; blocks are [positions, tokens], what is reduced [positions, 1]."""

    def sum(self, terms: Tensor) -> Tensor:
        """Over the tokens of each position."""
        return terms.sum(1, keepdim=True)

    def amax(self, logits: Tensor) -> Tensor:
        """Over the tokens of each position."""
        return logits.amax(1, keepdim=True)

    def chosen(self, block: Tensor, labels: Tensor) -> Tensor:
        """What stands at each position's label; labels [positions]."""
        return block.gather(1, labels.unsqueeze(1))

    def add_at(self, block: Tensor, labels: Tensor, value: float) -> None:
        """Add `value` in place at each position's label."""
        chosen = labels.unsqueeze(1)
        block.scatter_add_(1, chosen, torch.full_like(block[:, :1], value))


WHOLE = Vocabulary()


@dataclass(frozen=True)
class Shard(Vocabulary):
    """Tokens [start, end), whose rows of both heads are here; the other processes hold the rest.

    All processes of the group have the same positions and make the same calls.
    """

    group: dist.ProcessGroup
    start: int
    end: int

    def sum(self, terms: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        return self.total(terms.sum(1, keepdim=True))

    def amax(self, logits: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        own = logits.amax(1, keepdim=True)
        dist.all_reduce(own, dist.ReduceOp.MAX, self.group)
        return own

    def chosen(self, block: Tensor, labels: Tensor) -> Tensor:
        """What stands at each position's label, wherever that row is."""
        index, here = self._local(labels)
        return self.total(block.gather(1, index).masked_fill_(~here, 0))

    def add_at(self, block: Tensor, labels: Tensor, value: float) -> None:
        """Add `value` in place at the labels whose rows are here."""
        index, here = self._local(labels)
        block.scatter_add_(1, index, here.to(block.dtype).mul_(value))

    def total(self, part: Tensor) -> Tensor:
        """The sum over processes, in place."""
        dist.all_reduce(part, dist.ReduceOp.SUM, self.group)
        return part

    def gathered(self, block: Tensor) -> Tensor:
        """Every token's, of each process's block [..., own tokens]; no gradient flows."""
        end = -self.least(-self.end, block.device)
        whole = block.new_zeros(*block.shape[:-1], end)
        whole[..., self.start : self.end] = block.detach()
        return self.total(whole)

    def least(self, number: int, device: torch.device) -> int:
        """The least of every process's number."""
        least = torch.tensor([number], device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        return int(least)

    def _local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Row and whether it is here, [positions, 1] each; row 0 stands in for the others."""
        here = ((labels >= self.start) & (labels < self.end)).unsqueeze(1)
        return (labels.unsqueeze(1) - self.start).masked_fill_(~here, 0), here
