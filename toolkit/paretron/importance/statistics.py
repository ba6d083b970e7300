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

_BLOCK = 16  # positions summed in fp32 before fp64 takes over
_LITTLE = 0.3  # of the mean square: a smaller variance would keep too few of fp32's digits
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

    def of(self, taps: list[int]) -> AxisStatistics:
        """Those of some taps alone."""
        return AxisStatistics(self.samples, self.sums[taps], self.squares[taps])

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


def over_positions(values_TU: torch.Tensor, *, zeros: int = 0) -> torch.Tensor:
    """Mean, L2 norm and variance of |values| over the positions of ONE sample, fp64 [3, units].

    `zeros` more positions hold nothing but zeros. Sums and sums of squares are taken in parts that
    stay in the processor's cache; where the variance is little of the mean square, and would be
    lost in its rounding, it is computed again around the mean in fp64.
    """
    count = len(values_TU) + zeros
    totals = _power_sums(values_TU)
    mean, power = totals / count
    variance = power - mean.square()
    lost = variance < power * _LITTLE
    if bool(lost.any()):
        exact = values_TU[:, lost].abs().double()
        centre = exact.sum(0) / count
        around = (exact - centre).square().sum(0) + zeros * centre.square()
        variance[lost] = around / count
    return torch.stack((mean, totals[1].sqrt(), variance))


def _power_sums(values_TU: torch.Tensor) -> torch.Tensor:
    """Sums of |values| and of their squares over positions, fp64 [2, units].

    In fp32, a product with ones sums short blocks fastest; fp64 takes over from there.
    """
    whole = len(values_TU) // _BLOCK * _BLOCK
    if values_TU.dtype == torch.float64:
        whole = 0
    rest = values_TU[whole:].abs().double()
    totals = torch.stack((rest.sum(0), rest.square().sum(0)))
    if not whole:
        return totals
    units = values_TU.shape[1]
    rows = whole
    if values_TU.device.type == "cpu":
        rows = min(whole, max(1, _CACHED_VALUES // units // _BLOCK) * _BLOCK)
    buffer = values_TU.new_empty((rows, units), dtype=torch.float32)
    ones = buffer.new_ones(rows // _BLOCK, 1, _BLOCK)
    sums = buffer.new_empty(2, whole // _BLOCK, 1, units)
    for start in range(0, whole, rows):
        part = values_TU[start : min(start + rows, whole)]
        absolute = buffer[: len(part)]
        if part.dtype == torch.float32:
            torch.abs(part, out=absolute)
        else:
            absolute.copy_(part).abs_()
        blocks = absolute.view(-1, _BLOCK, units)
        places = slice(start // _BLOCK, start // _BLOCK + len(blocks))
        torch.bmm(ones[: len(blocks)], blocks, out=sums[0, places])
        torch.bmm(ones[: len(blocks)], blocks.square_(), out=sums[1, places])
    return totals + sums.squeeze(2).sum(1, dtype=torch.float64)
