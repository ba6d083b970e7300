"""Sums from which all nine aggregations follow: added as samples pass, merged by addition.

A sample gives each unit three numbers, aggregated over its positions: the mean of absolute values,
the L2 norm and the variance. Kept are their sums and sums of squares over samples; what a sample
adds does not depend on the batch it came in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Aggregation = Literal["mean", "l2", "var"]
AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "l2", "var")

_BLOCK = 32  # positions summed in fp32 before fp64 takes over
_CACHED_VALUES = 1 << 18  # values worked on at a time on a CPU: they stay in its cache


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


def over_positions(scores_TU: torch.Tensor) -> torch.Tensor:
    """Mean, L2 norm and variance over the positions of ONE sample, fp64 [3, units].

    `scores_TU` is non-negative. The variance is summed around the mean, and the L2 norm follows
    from both, so nothing cancels; fp32 input is summed in short blocks, then in fp64.
    """
    n, units = scores_TU.shape
    rows = max(_BLOCK, _CACHED_VALUES // units // _BLOCK * _BLOCK)
    parts = scores_TU.split(rows) if scores_TU.device.type == "cpu" else (scores_TU,)
    mean = _total(_block_sums(p) for p in parts) / n
    centre = mean.to(_sum_dtype(scores_TU))
    around = _total(_block_sums((p.to(centre.dtype) - centre).square_()) for p in parts)
    drift = n * (mean - centre.double()).square()  # the centre was rounded
    variance = ((around - drift) / n).clamp(min=0)
    l2 = (n * (variance + mean.square())).sqrt()
    return torch.stack((mean, l2, variance))


def _sum_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _block_sums(values_TU: torch.Tensor) -> torch.Tensor:
    """The fp64 sum over positions; a product with ones is the fastest reduction of rows."""
    values = values_TU.to(_sum_dtype(values_TU))
    if values.dtype == torch.float64:
        return values.sum(0)
    whole = len(values) // _BLOCK * _BLOCK
    total = values[whole:].sum(0, dtype=torch.float64)
    if whole:
        blocks = values[:whole].unflatten(0, (-1, _BLOCK))
        ones = values.new_ones(len(blocks), 1, _BLOCK)
        total += torch.bmm(ones, blocks).sum((0, 1), dtype=torch.float64)
    return total
