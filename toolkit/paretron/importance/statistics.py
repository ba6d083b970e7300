"""Sums from which all nine aggregations follow: added as samples pass, merged by addition.

A sample gives each unit three numbers, aggregated over its positions: the mean of absolute values,
the L2 norm and the variance. Kept are their sums and sums of squares over samples; what a sample
adds does not depend on the batch it came in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Aggregation = Literal["mean", "l2", "var"]
AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "l2", "var")

_BLOCK = 32  # positions summed in fp32 before fp64 takes over
_CACHED_VALUES = 1 << 19  # values worked on at a time on a CPU: they stay in its cache


@dataclass(frozen=True)
class AxisStatistics:
    """Sums over samples of one axis: `sums` and `squares` are fp64 [taps, 3, units].

    The middle dimension follows AGGREGATIONS.
    """

    samples: int
    sums: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def zeros(cls, taps: int, units: int) -> AxisStatistics:
        """Of no sample yet."""
        zeros = torch.zeros((taps, len(AGGREGATIONS), units), dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    def merged(self, other: AxisStatistics) -> AxisStatistics:
        """The statistics of both sets of samples together."""
        return AxisStatistics(
            self.samples + other.samples, self.sums + other.sums, self.squares + other.squares
        )


def aggregate(
    statistics: AxisStatistics, *, batch: Aggregation, sequence: Aggregation
) -> torch.Tensor:
    """Scores [taps, units] in fp64: `sequence` over positions, then `batch` over samples.

    Paper 1, section 2.2: mean (of absolute values), L2 norm, variance (divided by n).
    """
    k = AGGREGATIONS.index(sequence)
    sums, squares, n = statistics.sums[:, k], statistics.squares[:, k], statistics.samples
    if batch == "mean":
        return sums / n
    if batch == "l2":
        return squares.sqrt()
    return (squares / n - (sums / n).square()).clamp(min=0)


def over_positions(values_TU: torch.Tensor) -> torch.Tensor:
    """Mean, L2 norm and variance of |values| over the positions of ONE sample, fp64 [3, units].

    Worked through in parts that stay in the processor's cache, each centred on its own mean, so
    that nothing cancels; parts are joined in fp64 (Chan, Golub, LeVeque 1983).
    """
    rows = len(values_TU)
    if values_TU.device.type == "cpu":
        rows = max(_BLOCK, _CACHED_VALUES // values_TU.shape[1] // _BLOCK * _BLOCK)
    wide = values_TU.dtype == torch.float64
    buffer = values_TU.new_empty(
        (rows, values_TU.shape[1]), dtype=torch.float64 if wide else torch.float32
    )
    parts = [_moments(_absolute(p, out=buffer[: len(p)])) for p in values_TU.split(rows)]
    counts = buffer.new_tensor([[n] for n, _, _ in parts], dtype=torch.float64)
    means, around = (torch.stack(x) for x in list(zip(*parts, strict=True))[1:])
    n = len(values_TU)
    mean = (counts * means).sum(0) / n
    variance = (around.sum(0) + (counts * (means - mean).square()).sum(0)).clamp(min=0) / n
    return torch.stack((mean, (n * (variance + mean.square())).sqrt(), variance))


def _absolute(values_TU: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    if values_TU.dtype == out.dtype:
        return torch.abs(values_TU, out=out)
    return out.copy_(values_TU).abs_()


def _moments(values_TU: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Count, mean and squares around the mean, in fp64; the values are used up."""
    n = len(values_TU)
    mean = _column_sums(values_TU) / n
    centre = mean.to(values_TU.dtype)
    around = _column_sums(values_TU.sub_(centre).square_())
    return n, mean, around - n * (mean - centre.double()).square()  # the centre was rounded


def _column_sums(values_TU: torch.Tensor) -> torch.Tensor:
    """The sum over positions in fp64; for fp32, a product with ones sums short blocks fastest."""
    if values_TU.dtype == torch.float64:
        return values_TU.sum(0)
    whole = len(values_TU) // _BLOCK * _BLOCK
    total = values_TU[whole:].sum(0, dtype=torch.float64)
    if whole:
        blocks = values_TU[:whole].unflatten(0, (-1, _BLOCK))
        ones = values_TU.new_ones(len(blocks), 1, _BLOCK)
        total += torch.bmm(ones, blocks).sum((0, 1), dtype=torch.float64)
    return total
