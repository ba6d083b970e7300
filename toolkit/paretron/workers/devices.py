"""How fast devices could be, by their names, as their vendors say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Peak:
    """A vendor's figures of one device: bytes/s of its memory, bytes, dense FLOP/s by dtype."""

    name: str
    bandwidth_bytes_s: float
    memory_bytes: int
    flop_s: Mapping[str, float]


def _peak(
    name: str,
    *,
    tb_s: float,
    gigabytes: int,
    fp32: float,
    bf16: float,
    int8: float,
    fp8: float | None,
) -> Peak:
    """A row in the units of data sheets: TB/s, GB, TFLOP/s; float16 is as fast as bfloat16."""
    rates = {"float32": fp32, "bfloat16": bf16, "float16": bf16, "int8": int8}
    if fp8 is not None:
        rates["fp8"] = fp8
    flop_s = MappingProxyType({dtype: rate * 1e12 for dtype, rate in rates.items()})
    return Peak(name, tb_s * 1e12, gigabytes * 10**9, flop_s)


# From NVIDIA's data sheets and architecture white papers, of the SXM variant where a name says no
# more. Rates of matrices are without sparsity, half of what most sheets print, and accumulate in
# FP32; `fp32` is that of the CUDA cores.
PEAKS: tuple[Peak, ...] = (
    _peak("B200", tb_s=8.0, gigabytes=180, fp32=75, bf16=2250, int8=4500, fp8=4500),
    _peak("GH200", tb_s=4.0, gigabytes=96, fp32=67, bf16=989, int8=1979, fp8=1979),
    _peak("H200", tb_s=4.8, gigabytes=141, fp32=67, bf16=989, int8=1979, fp8=1979),
    _peak("H200 NVL", tb_s=4.8, gigabytes=141, fp32=60, bf16=836, int8=1671, fp8=1671),
    _peak("H100", tb_s=3.35, gigabytes=80, fp32=67, bf16=989, int8=1979, fp8=1979),
    _peak("H100 NVL", tb_s=3.9, gigabytes=94, fp32=60, bf16=836, int8=1671, fp8=1671),
    _peak("H100 PCIe", tb_s=2.0, gigabytes=80, fp32=51, bf16=756, int8=1513, fp8=1513),
    _peak("H20", tb_s=4.0, gigabytes=96, fp32=44, bf16=148, int8=296, fp8=296),
    _peak("A100", tb_s=2.039, gigabytes=80, fp32=19.5, bf16=312, int8=624, fp8=None),
    _peak("A100 80GB PCIe", tb_s=1.935, gigabytes=80, fp32=19.5, bf16=312, int8=624, fp8=None),
    _peak("A100 40GB", tb_s=1.555, gigabytes=40, fp32=19.5, bf16=312, int8=624, fp8=None),
    _peak("L40S", tb_s=0.864, gigabytes=48, fp32=91.6, bf16=362, int8=733, fp8=733),
    _peak("L40", tb_s=0.864, gigabytes=48, fp32=90.5, bf16=181, int8=362, fp8=362),
    _peak("L4", tb_s=0.3, gigabytes=24, fp32=30.3, bf16=121, int8=242, fp8=242),
    _peak("A10", tb_s=0.6, gigabytes=24, fp32=31.2, bf16=125, int8=250, fp8=None),
    _peak("RTX 4090", tb_s=1.008, gigabytes=24, fp32=82.6, bf16=165, int8=661, fp8=330),
    _peak("RTX 3090", tb_s=0.936, gigabytes=24, fp32=35.6, bf16=71, int8=284, fp8=None),
)


def peak_of(name: str) -> Peak | None:
    """The row for a name as a driver gives it, or a person; None for one that the table lacks.

    Every word of a row's name must be a word of `name`; of several rows the one with most words.
    """
    words = _words(name)
    found = [peak for peak in PEAKS if _words(peak.name) <= words]
    return max(found, key=lambda peak: len(_words(peak.name)), default=None)


def peak_flop_s(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None for one that the table lacks."""
    peak = peak_of(name)
    return None if peak is None else peak.flop_s["bfloat16"]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))
