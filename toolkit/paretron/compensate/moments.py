"""Second moments of activations: mergeable sums, and the regressions that they solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Sums over tokens, fp64: `inputs` = sum of a a^T [A, A], `cross` = sum of y a^T [Y, A].

    Sums of two sets of tokens add up to those of both, in any order and split.
    """

    tokens: int
    inputs: torch.Tensor
    cross: torch.Tensor
    squares: float  # sum of y^2

    @classmethod
    def zeros(cls, inputs: int, outputs: int, *, device: torch.device | None = None) -> Moments:
        """Of no token yet."""
        return cls(
            0,
            torch.zeros((inputs, inputs), dtype=torch.float64, device=device),
            torch.zeros((outputs, inputs), dtype=torch.float64, device=device),
            0.0,
        )

    def add(self, a_NA: torch.Tensor, y_NY: torch.Tensor) -> None:
        """Count N tokens: what a matrix reads and what it should give."""
        a, y = a_NA.double(), y_NY.double()
        self.tokens += len(a)
        self.inputs.addmm_(a.T, a)
        self.cross.addmm_(y.T, a)
        self.squares += float(y.square().sum())

    def merged(self, other: Moments) -> Moments:
        """The sums over both sets of tokens."""
        return Moments(
            self.tokens + other.tokens,
            self.inputs + other.inputs,
            self.cross + other.cross,
            self.squares + other.squares,
        )

    def solve(self, *, ridge: float) -> torch.Tensor:
        """W [Y, A] that minimises the sum of |y - W a|^2 + lambda |W|^2.

        W = (sum y a^T) (sum a a^T + lambda I)^-1, lambda = `ridge` times the mean of the diagonal.
        The sums are used up.
        """
        if not self.cross.any():
            return self.cross
        diagonal = self.inputs.diagonal()
        diagonal += ridge * diagonal.mean() + torch.finfo(torch.float64).tiny
        factor, failed = torch.linalg.cholesky_ex(self.inputs)
        if int(failed):  # inputs that are no more than rank-deficient, and no ridge to speak of
            return torch.linalg.lstsq(self.inputs, self.cross.T, driver="gelsd").solution.T
        return torch.cholesky_solve(self.cross.T, factor).T

    def error(self, weight_YA: torch.Tensor) -> float:
        """The sum of |y - W a|^2 for a matrix; ask before `solve`, which uses the sums up."""
        w = weight_YA.double()
        return float(self.squares - 2 * (w * self.cross).sum() + ((w @ self.inputs) * w).sum())
