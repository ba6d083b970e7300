"""Records of the k likeliest tokens, made and read on any device: `artifacts.toptokens`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from paretron.artifacts.toptokens import RANGE, TAIL_BYTES, TopTokensLayout
from paretron.distill.top import TopTokens

_TAIL_LEVELS = (1 << 8 * TAIL_BYTES) - 1


@dataclass(frozen=True)
class TopTokensCodec(TopTokensLayout):
    """Of softmax(logits / temperature)."""

    temperature: float = 1.0

    @property
    def error(self) -> float:
        """By how much a log-probability above the range's end can be off, in nats.

        Half a level for it, as much for the sum of all, half a step of the tail, and what lies
        below the range; fp32 rounds another 1e-5. With this bound b, KL(written || true) is at most
        b^2 exp(b) / 2 (E[r - 1 - log r] of a ratio r within exp(-b) and exp(b)).
        """
        level, tail = RANGE / ((1 << self.level_bits) - 1), 2 * RANGE / _TAIL_LEVELS
        return level + tail / 2 + self.k * math.exp(-RANGE) + 1e-5

    def encode(self, top: TopTokens) -> Tensor:
        """The records uint8 [positions, record_bytes] of finite log-probabilities."""
        ids, order = top.ids.sort(dim=1)
        log_p = top.log_probabilities.gather(1, order).float()
        below = log_p - log_p.amax(1, keepdim=True)
        levels = (1 << self.level_bits) - 1
        level = (below * (-levels / RANGE)).round_().clamp_(0, levels).long()
        low = ids & ((1 << self.low_bits) - 1)
        entries = _as_bytes(low << self.level_bits | level, self.entry_bytes)

        odds = top.log_rest.float() - log_p.logsumexp(1, keepdim=True)
        tail = ((odds + RANGE) * (_TAIL_LEVELS / (2 * RANGE))).round_().clamp_(0, _TAIL_LEVELS)

        steps = (ids >> self.low_bits) + torch.arange(self.k, device=ids.device)
        bits = ids.new_zeros(len(ids), 8 * self.bitmap_bytes, dtype=torch.uint8).scatter_(
            1, steps, 1
        )
        bitmap = (bits.view(len(ids), -1, 8) << _shifts(bits)).sum(2, dtype=torch.uint8)
        return torch.cat([entries, bitmap, _as_bytes(tail.long(), TAIL_BYTES)], dim=1)

    def decode(self, records: Tensor) -> TopTokens:
        """The inverse of `encode`, ids ascending; ValueError where a bitmap is not one of k ids."""
        parts = [self.k * self.entry_bytes, self.bitmap_bytes, TAIL_BYTES]
        entries, bitmap, tail = records.split(parts, dim=1)
        entry = _as_numbers(entries.unflatten(1, (self.k, self.entry_bytes)))

        set_ = ((bitmap.unsqueeze(2) >> _shifts(bitmap)) & 1).flatten(1).nonzero()
        rows = torch.arange(len(records), device=records.device).repeat_interleave(self.k)
        if len(set_) != len(rows) or not torch.equal(set_[:, 0], rows):
            raise ValueError("a bitmap that does not hold k ids")
        high = set_[:, 1].view(-1, self.k) - torch.arange(self.k, device=records.device)
        ids = high << self.low_bits | entry >> self.level_bits

        level = entry & ((1 << self.level_bits) - 1)
        below = level.float().mul_(-RANGE / ((1 << self.level_bits) - 1))
        odds = _as_numbers(tail.unsqueeze(1)).float() * (2 * RANGE / _TAIL_LEVELS) - RANGE
        log_p = below - below.logsumexp(1, keepdim=True) + logsigmoid(-odds)
        return TopTokens(ids, log_p, logsigmoid(odds), self.vocab_size, self.temperature)


def _as_bytes(numbers: Tensor, size: int) -> Tensor:
    """[n, m] as little-endian bytes, uint8 [n, m * size]."""
    places = torch.arange(0, 8 * size, 8, device=numbers.device)
    return (numbers.unsqueeze(-1) >> places & 255).to(torch.uint8).flatten(1)


def _as_numbers(parts: Tensor) -> Tensor:
    """Little-endian bytes [..., size] as int64 [...]."""
    number = parts[..., 0].long()
    for place in range(1, parts.shape[-1]):
        number |= parts[..., place].long() << 8 * place
    return number


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
