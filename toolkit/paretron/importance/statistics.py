"""Sums from which all nine aggregations follow: added as samples pass, merged by addition.

A sample gives each unit three numbers, aggregated over its positions: the mean of absolute values,
the L2 norm and the variance. Kept are their sums and sums of squares over samples; what a sample
adds does not depend on the batch it came in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Aggregation = Literal["mean", "l2", "var"]
AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "l2", "var")

# Of the mean square: a variance below this over the root of the number of blocks would be wrong by
# more than 1e-6, for the roundings of the blocks average out (measured on columns of every ratio).
_LITTLE = 0.55
_BLOCK = 16  # positions summed in fp32 before fp64 takes over
_CACHED_VALUES = 1 << 18  # values worked on at a time on a CPU: they stay in its cache
_FEW_UNITS = 64  # so few cost nothing in fp64: norms of heads, whose variance fp32 would lose


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

    `zeros` more positions hold nothing but zeros. Where the variance is little of the mean square,
    and would be lost in the rounding of fp32, it is computed again around the mean in fp64.
    """
    count = len(values_TU) + zeros
    if values_TU.dtype == torch.float64 or values_TU.shape[1] <= _FEW_UNITS:
        values_TU = values_TU.double()
    totals = _power_sums(values_TU)
    mean, power = totals / count
    variance = power - mean.square()
    lost = variance < power * (_LITTLE / math.sqrt(max(1, len(values_TU) // _BLOCK)))
    if bool(lost.any()):
        exact = values_TU[:, lost].abs().double()
        centre = exact.sum(0) / count
        around = (exact - centre).square().sum(0) + zeros * centre.square()
        variance[lost] = around / count
    return torch.stack((mean, totals[1].sqrt(), variance))


def _power_sums(values_TU: torch.Tensor) -> torch.Tensor:
    """Sums of |values| and of their squares over positions, fp64 [2, units].

    Whole blocks are summed in fp32; the rest, and what came in fp64, in fp64.
    """
    whole = 0 if values_TU.dtype == torch.float64 else len(values_TU) // _BLOCK * _BLOCK
    rest = values_TU[whole:].abs().double()
    totals = torch.stack((rest.sum(0), rest.square().sum(0)))
    if not whole:
        return totals
    blocks_NKU = values_TU[:whole].unflatten(0, (-1, _BLOCK))
    return totals + _block_sums(blocks_NKU).sum(1, dtype=torch.float64)


def _block_sums(values_NKU: torch.Tensor) -> torch.Tensor:
    """Sums of |values| and of their squares over each block of positions, fp32 [2, N, units].

    A product with ones sums short blocks faster than a reduction does.
    """
    number, block, units = values_NKU.shape
    at_once = number
    if values_NKU.device.type == "cpu":
        at_once = min(number, max(1, _CACHED_VALUES // (units * block)))
    buffer = values_NKU.new_empty((at_once, block, units), dtype=torch.float32)
    ones = buffer.new_ones(at_once, 1, block)
    sums = buffer.new_empty(2, number, 1, units)
    for start in range(0, number, at_once):
        part = values_NKU[start : start + at_once]
        absolute = buffer[: len(part)]
        if part.dtype == torch.float32:
            torch.abs(part, out=absolute)
        else:
            absolute.copy_(part).abs_()
        places = slice(start, start + len(part))
        torch.bmm(ones[: len(part)], absolute, out=sums[0, places])
        torch.bmm(ones[: len(part)], absolute.square_(), out=sums[1, places])
    return sums.squeeze(2)
