"""What is known of a teacher of whom only the likeliest tokens were kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paretron.families.logits import PLAIN, LogitRule

# Between the least likely of the kept tokens and any other: more than fp32 rounds away.
_GAP = 1e-4


@dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens of each position, and all others as one.

    ids [..., k], log_probabilities [..., k] and log_rest [..., 1] of softmax(logits / temperature);
    their masses sum to 1. `num_tokens` is the size of the vocabulary, more than k.
    """

    ids: Tensor
    log_probabilities: Tensor
    log_rest: Tensor
    num_tokens: int
    temperature: float = 1.0

    @property
    def k(self) -> int:
        """How many tokens are known of each position."""
        return self.ids.shape[-1]

    @property
    def rule(self) -> LogitRule:
        """Caps and divisors have done their work before."""
        return PLAIN

    def shaped(self, *positions: int) -> TopTokens:
        """The same with these dimensions of positions."""
        return replace(
            self,
            ids=self.ids.view(*positions, self.k),
            log_probabilities=self.log_probabilities.view(*positions, self.k),
            log_rest=self.log_rest.view(*positions, 1),
        )

    @classmethod
    def of(cls, logits: Tensor, *, k: int, temperature: float) -> TopTokens:
        """Those of whole logits [..., tokens]."""
        scaled = logits / temperature
        scaled -= scaled.amax(-1, keepdim=True)  # or fp32 would round by the size of the logits
        log_all = scaled - scaled.logsumexp(-1, keepdim=True)
        top, ids = log_all.topk(k, dim=-1)
        log_rest = log_all.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return cls(ids, top, log_rest, logits.shape[-1], temperature)

    def detach(self) -> TopTokens:
        """The same: no gradient ever flows through it."""
        return self

    def flat(self) -> TopTokens:
        """The same with one dimension of positions."""
        return self.shaped(-1)

    def at(self, positions: Tensor | slice) -> TopTokens:
        """Those of some positions, of one dimension of positions."""
        return replace(
            self,
            ids=self.ids[positions],
            log_probabilities=self.log_probabilities[positions],
            log_rest=self.log_rest[positions],
        )

    def logits(self, positions: slice, buffer: Tensor) -> Tensor:
        """Logits that say the same, written into the first rows of the buffer [..., tokens].

        What is left over is spread evenly, below each of the k: which of the other tokens a teacher
        preferred is not known, and no loss that counts them as one asks.
        """
        some = self.at(positions)
        block = buffer[: len(some.ids)]
        even = some.log_rest - math.log(self.num_tokens - self.k)
        least = some.log_probabilities.amin(1, keepdim=True)
        block.copy_(torch.minimum(even, least - _GAP).expand_as(block))
        block.scatter_(1, some.ids, some.log_probabilities.to(block.dtype))
        return block if self.temperature == 1 else block.mul_(self.temperature)

    def label_losses(self, labels: Tensor) -> Tensor:
        """-log p of labels [positions], at this temperature; fp32, one dimension of positions."""
        found = self.ids == labels.unsqueeze(1)
        known = self.log_probabilities.masked_fill(~found, 0.0).sum(1)
        even = self.log_rest.squeeze(1) - math.log(self.num_tokens - self.k)
        return -torch.where(found.any(1), known, even)
