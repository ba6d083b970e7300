"""Loss of teacher and student on held samples, taken while their heads pass by in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paretron.families.logits import LogitRule

_TOKENS_AT_ONCE = 4096  # times a block of rows: the logits that exist at a time


@dataclass
class HeadLoss:
    """Next-token loss of hidden states whose head comes in blocks: logsumexp kept as it grows.

    `states_ND` are what the head reads, `targets_N` the tokens that follow, on the same device.
    """

    states_ND: torch.Tensor
    targets_N: torch.Tensor
    rule: LogitRule

    def __post_init__(self) -> None:
        device = self.states_ND.device
        self._target = torch.zeros(len(self.targets_N), dtype=torch.float64, device=device)
        self._logsum = torch.full_like(self._target, -torch.inf)
        self._seen = 0

    def add(self, rows_VD: torch.Tensor) -> None:
        """Count the next rows of the head."""
        rows = rows_VD.to(self.states_ND)
        last = self._seen + len(rows)
        for start in range(0, len(self.targets_N), _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            logits = self.rule(self.states_ND[part] @ rows.T).double()
            self._logsum[part] = torch.logaddexp(self._logsum[part], logits.logsumexp(-1))
            local = self.targets_N[part] - self._seen
            here = (local >= 0) & (local < len(rows))
            found = logits.gather(-1, local.clamp(0, len(rows) - 1)[:, None])[:, 0]
            self._target[part] = torch.where(here, found, self._target[part])
        self._seen = last

    @property
    def mean(self) -> float:
        """Mean loss in nats over the tokens, once every row has come."""
        return float((self._logsum - self._target).mean())
