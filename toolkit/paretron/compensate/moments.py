"""Second moments of activations, and the regressions that they solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paretron.compensate.symmetric import Symmetric

_TOKENS_AT_ONCE = 512  # whose fp64 copies exist at a time


@dataclass
class Moments:
    """Sums over tokens, fp64: `inputs` = sum of a a^T [A, A], `cross` = sum of y a^T [Y, A]."""

    tokens: int
    inputs: Symmetric
    cross: torch.Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, *, device: torch.device | None = None) -> Moments:
        """Of no token yet."""
        cross = torch.zeros((outputs, inputs), dtype=torch.float64, device=device)
        return cls(0, Symmetric(inputs, device=device), cross)

    def add(self, a_NA: torch.Tensor, y_NY: torch.Tensor) -> None:
        """Count N tokens: what a matrix reads and what it should give."""
        pairs = zip(a_NA.split(_TOKENS_AT_ONCE), y_NY.split(_TOKENS_AT_ONCE), strict=True)
        for a, y in pairs:
            wide = a.double()
            self.inputs.add(wide)
            self.cross.addmm_(y.double().T, wide)
        self.tokens += len(a_NA)

    def solve(self, *, ridge: float) -> torch.Tensor:
        """W [Y, A] that minimises the sum of |y - W a|^2 + lambda |W|^2.

        W = (sum y a^T) (sum a a^T + lambda I)^-1, lambda = `ridge` times the mean of the diagonal.
        The sums are used up.
        """
        if not self.cross.any():
            return self.cross
        more = ridge * self.inputs.mean_diagonal() + torch.finfo(torch.float64).tiny
        for part in self.inputs.diagonals:
            part += more
        self.inputs.factor()
        self.inputs.solve(self.cross)
        return self.cross
