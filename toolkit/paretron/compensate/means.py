"""The fit of a mean: what FLAP adds as a bias, in the columns that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Means:
    """Sums over tokens, fp64: `inputs` = sum of a [A], `missing` = sum of y [Y]."""

    inputs: torch.Tensor
    missing: torch.Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, *, device: torch.device | None = None) -> Means:
        """Of no token yet."""
        a, y = (torch.zeros(n, dtype=torch.float64, device=device) for n in (inputs, outputs))
        return cls(a, y)

    def add(self, a_NA: torch.Tensor, y_NY: torch.Tensor) -> None:
        """Count N tokens: what a matrix reads, and what its output lacks."""
        self.inputs += a_NA.sum(0, dtype=torch.float64)
        self.missing += y_NY.sum(0, dtype=torch.float64)

    def solve(self) -> torch.Tensor:
        """The smallest W [Y, A] by Frobenius norm with W E[a] = E[y]; 0 where E[a] is 0.

        W = E[y] E[a]^T / |E[a]|^2. FLAP (arXiv 2312.11983, section 3.4) adds E[y], the mean output
        of what was removed, as a bias; checkpoints of most families have no place for one.
        """
        square = self.inputs.square().sum()
        if not square:
            return torch.zeros(len(self.missing), len(self.inputs), dtype=torch.float64)
        return torch.outer(self.missing, self.inputs) / square
