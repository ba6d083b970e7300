"""A positive matrix of which only the lower half is kept, in blocks: summed, factored, solved.

Half the memory and half the work of the whole matrix, and nothing is copied: the factor takes the
place of the sum, a solution that of its right-hand sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCK = 1024  # rows of a block: a product of two keeps a core busy, and one is 8 MB


class Symmetric:
    """A sum of products a^T a over tokens, fp64 [A, A]; zero at first."""

    def __init__(
        self, size: int, *, device: torch.device | None = None, block: int = BLOCK
    ) -> None:
        self._spans = [slice(s, min(s + block, size)) for s in range(0, size, block)]
        lengths = [span.stop - span.start for span in self._spans]
        places = [(i, j) for i in range(len(lengths)) for j in range(i + 1)]
        # One allocation, and no block is ever replaced: what is freed goes back whole.
        flat = torch.zeros(
            sum(lengths[i] * lengths[j] for i, j in places), dtype=torch.float64, device=device
        )
        parts = flat.split([lengths[i] * lengths[j] for i, j in places])
        self._blocks = {
            (i, j): part.view(lengths[i], lengths[j])
            for (i, j), part in zip(places, parts, strict=True)
        }

    def add(self, a_NA: torch.Tensor) -> None:
        """Add a^T a of N tokens, fp64."""
        for (i, j), block in self._blocks.items():
            block.addmm_(a_NA[:, self._spans[i]].T, a_NA[:, self._spans[j]])

    def dense(self) -> torch.Tensor:
        """The whole matrix, [A, A]."""
        count = range(len(self._spans))
        rows = [
            [self._blocks[i, j] if j <= i else self._blocks[j, i].T for j in count] for i in count
        ]
        return torch.cat([torch.cat(row, 1) for row in rows])

    @property
    def diagonals(self) -> Sequence[torch.Tensor]:
        """Views of the diagonal, block after block."""
        return [self._blocks[i, i].diagonal() for i in range(len(self._spans))]

    def mean_diagonal(self) -> float:
        """The mean square of what was summed, times the tokens."""
        parts = self.diagonals
        return float(sum(float(p.sum()) for p in parts)) / sum(len(p) for p in parts)

    def factor(self) -> None:
        """Put L, the lower factor of L L^T, in the place of the matrix.

        A block that rounding keeps from being positive gets as much more on its diagonal as makes
        it so: what no token told apart is then left near zero by a solution.
        """
        count = len(self._spans)
        size = self._spans[-1].stop
        least = torch.finfo(torch.float64).eps * size * self.mean_diagonal()
        for k in range(count):
            corner = self._blocks[k, k].copy_(_cholesky(self._blocks[k, k], least))
            for i in range(k + 1, count):
                self._divide(self._blocks[i, k], corner.T, upper=True)
            for i in range(k + 1, count):
                for j in range(k + 1, i + 1):
                    self._blocks[i, j].addmm_(self._blocks[i, k], self._blocks[j, k].T, alpha=-1)

    def solve(self, right_YA: torch.Tensor) -> None:
        """Put X with X L L^T = R in the place of R [Y, A]; after `factor`."""
        parts = [right_YA[:, span] for span in self._spans]  # views
        count = range(len(parts))
        for k in count:
            for j in range(k):
                parts[k].addmm_(parts[j], self._blocks[k, j].T, alpha=-1)
            self._divide(parts[k], self._blocks[k, k].T, upper=True)
        for k in reversed(count):
            for j in range(k + 1, len(parts)):
                parts[k].addmm_(parts[j], self._blocks[j, k], alpha=-1)
            self._divide(parts[k], self._blocks[k, k], upper=False)

    @staticmethod
    def _divide(part: torch.Tensor, corner: torch.Tensor, *, upper: bool) -> None:
        part.copy_(torch.linalg.solve_triangular(corner, part, upper=upper, left=False))


def _cholesky(block: torch.Tensor, least: float) -> torch.Tensor:
    """The lower factor of a block; more is added to its diagonal, from `least` up, if it has none.

    ValueError for a block with NaN or infinite entries.
    """
    if not torch.isfinite(block).all():
        raise ValueError("sums of activations are NaN or infinite")
    more = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(
            block + more * torch.eye(len(block)).to(block) if more else block
        )
        if not int(failed):
            return factor
        more = max(least, 10 * more, torch.finfo(torch.float64).tiny)
