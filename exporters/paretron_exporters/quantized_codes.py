"""Numbers of few bits: encoding a matrix, decoding what is stored, and what rounding may do to it.

What is stored of a matrix is a mapping from the last part of a tensor's name ("weight",
"weight_scale", ...) to the tensor. All arithmetic is in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paretron_exporters.quantized_forms import (
    INT4_BLOCK,
    NVFP4_BLOCK,
    SCALE,
    SCALE_2,
    SMOOTH,
    Codes,
)

Stored = Mapping[str, torch.Tensor]

INT8_LARGEST, INT4_LARGEST, FP8_LARGEST, FP4_LARGEST = 127.0, 7.0, 448.0, 6.0
LARGEST: Mapping[Codes, float] = {
    "int8": INT8_LARGEST, "int4": INT4_LARGEST, "fp8": FP8_LARGEST, "nvfp4": FP4_LARGEST,
}  # fmt: skip
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_HALF_GAPS = (0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1.0, 1.0)  # to the larger neighbour
_FP8_SMALLEST = 2.0**-9
_FP8_SMALLEST_EXPONENT = -6  # below, numbers are 2^-9 apart


def row_scales(weight: torch.Tensor, codes: Codes) -> torch.Tensor:
    """One scale for each row, float32 [out, 1]: the row's largest weight gets the largest code.

    A row of zeros gets 1, whatever its codes.
    """
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest / LARGEST[codes], torch.ones_like(largest))


def encode_rows(weight: torch.Tensor, scales: torch.Tensor, codes: Codes) -> torch.Tensor:
    """Codes of a matrix, int8 or float8_e4m3fn [out, in], rounded to the nearest, ties to even."""
    scaled = weight.float().div_(scales) if weight.dtype != torch.float32 else weight / scales
    largest = LARGEST[codes]
    if codes == "int8":
        return scaled.round_().clamp_(-largest, largest).to(torch.int8)
    return scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn)


def decode(stored: Stored, codes: Codes) -> torch.Tensor:
    """The matrix [out, in] that an engine multiplies its plain inputs with."""
    return _values(stored, codes) * _steps(stored, codes) * _smoothing(stored)


def rounding(stored: Stored, codes: Codes) -> torch.Tensor:
    """How far rounding to the nearest code may have moved each weight: half a gap, [out, in]."""
    gaps: torch.Tensor
    values = _values(stored, codes).abs()
    match codes:
        case "int8" | "int4":
            gaps = torch.full_like(values, 0.5)
        case "fp8":
            exponents = torch.frexp(values).exponent - 1  # values in [2^e, 2^(e+1))
            exponents = torch.where(values > 0, exponents, _FP8_SMALLEST_EXPONENT)
            gaps = torch.exp2(exponents.clamp(min=_FP8_SMALLEST_EXPONENT).float() - 4)
        case "nvfp4":
            place = torch.bucketize(values, torch.tensor(_FP4))
            gaps = torch.tensor(_FP4_HALF_GAPS)[place]
    return gaps * _steps(stored, codes) * _smoothing(stored)


def expected_scales(smoothed: torch.Tensor, codes: Codes, *, scales: torch.Tensor) -> torch.Tensor:
    """What the scales of a matrix should be, in the shape of `scales`, which tells one a row, a
    block or a matrix. `smoothed` is the matrix as it is encoded."""
    size = smoothed.abs()
    if codes == "nvfp4":
        return size.amax() / (FP4_LARGEST * FP8_LARGEST)
    if codes == "int4":
        size = size.unflatten(1, (-1, INT4_BLOCK)).amax(dim=2)
    elif scales.dim():
        size = size.amax(dim=1).view(scales.shape)
    else:
        size = size.amax()
    return size / LARGEST[codes]


def expected_blocks(smoothed: torch.Tensor, *, scale_2: torch.Tensor) -> torch.Tensor:
    """NVFP4's scale of every block of 16, float8_e4m3fn, under the matrix's own scale.

    A block of zeros gets 1, and none is smaller than the smallest number of eight bits.
    """
    largest = smoothed.abs().unflatten(1, (-1, NVFP4_BLOCK)).amax(dim=2)
    scaled = (largest / (FP4_LARGEST * scale_2)).clamp(_FP8_SMALLEST, FP8_LARGEST)
    return torch.where(largest > 0, scaled, torch.ones_like(scaled)).to(torch.float8_e4m3fn)


def round_fp4(values: torch.Tensor) -> torch.Tensor:
    """Each number's nearest among those of four bits (e2m1)."""
    table = torch.tensor(_FP4, device=values.device)
    middle = (table[1:] + table[:-1]) / 2
    return table[torch.bucketize(values.abs(), middle)] * values.sign()


def _values(stored: Stored, codes: Codes) -> torch.Tensor:
    """The numbers that the codes stand for, before any scale."""
    weight = stored["weight"]
    if codes in ("int8", "fp8"):
        return weight.float()
    low, high = weight & 0xF, weight >> 4
    if codes == "int4":  # two rows in one
        both = torch.stack((low, high), dim=1).flatten(0, 1).to(torch.int8)
        return torch.where(both > 7, both - 16, both).float()
    both = torch.stack((low, high), dim=-1).flatten(-2)  # two neighbours of a row in one
    table = torch.tensor((*_FP4, *(-v for v in _FP4)))
    return table[both.long()]


def _steps(stored: Stored, codes: Codes) -> torch.Tensor:
    """The scale of each weight, to be multiplied with [out, in]."""
    scale = stored[SCALE].float()
    if codes == "int4":
        return scale.repeat_interleave(INT4_BLOCK, dim=1)
    if codes == "nvfp4":
        return scale.repeat_interleave(NVFP4_BLOCK, dim=1) * stored[SCALE_2].float()
    return scale.unsqueeze(1) if scale.dim() == 1 else scale


def _smoothing(stored: Stored) -> torch.Tensor:
    smooth = stored.get(SMOOTH)
    return torch.ones(()) if smooth is None else smooth.float()
