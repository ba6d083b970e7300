"""NaN and infinity found in the bits: nothing but their exponents is all ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# The smallest bit pattern, sign aside, that is not a finite number; E4M3 has NaN alone.
_NOT_FINITE: Mapping[str, int] = {
    "F64": 0x7FF0000000000000, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80,
    "F8_E5M2": 0x7C, "F8_E4M3": 0x7F,
}  # fmt: skip


def count_nonfinite(raw: NDArray[np.uint8], dtype: str) -> int:
    """How many values of a safetensors dtype in `raw` [bytes] are NaN or infinite.

    Bit patterns are ordered like magnitudes, so two maxima over integers decide: positive values
    stand out as signed, negative ones as unsigned numbers. No temporary of full size is made.
    """
    limit = _NOT_FINITE.get(dtype)
    if limit is None or not raw.size:
        return 0
    nbytes = 8 if dtype == "F64" else 4 if dtype == "F32" else 2 if dtype[-2:] == "16" else 1
    unsigned = raw.view(f"u{nbytes}")
    sign = 1 << (8 * nbytes - 1)
    if unsigned.view(f"i{nbytes}").max() < limit and unsigned.max() < sign + limit:
        return 0
    return int(((unsigned & np.array(sign - 1, unsigned.dtype)) >= limit).sum())
