"""A device as a roofline sees it: bytes a second, FLOPs a second, seconds a launch.

Either measured by the probe, or given: by a name of the table of vendors' peaks, or by numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron.workers.devices import PEAKS, peak_of
from paretron_profiling.schema import jsonable

DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
_NUMBERS = ("bandwidth", "flops", "memory", "launch", *DTYPES)


@dataclass(frozen=True)
class Device:
    """What bounds a model's speed on a device.

    bandwidth_bytes_s is that of reading what no cache holds; `bandwidths` (bytes, bytes/s) that of
    reading so many bytes again and again, where it was measured. flop_s are dense products of
    matrices, None where the device or the library has none in a dtype. launch_s is what one more
    small kernel costs in a chain of them, launch_sync_s with waiting for it. spread: (max - min) /
    median of each measured figure.
    """

    name: str
    kind: str  # "cpu" or "cuda"
    bandwidth_bytes_s: float
    flop_s: Mapping[str, float | None]
    memory_bytes: int | None = None
    launch_s: float | None = None
    launch_sync_s: float | None = None
    measured: bool = False
    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    bandwidths: tuple[tuple[int, float], ...] = ()

    def bandwidth_of(self, nbytes: float) -> float:
        """The fastest that `nbytes` could be read again and again, in bytes/s.

        What is measured of a smaller size may be faster, as more of it is in a cache; so the
        largest measured size below counts, and everything above it. It never grows with `nbytes`.
        """
        sizes = [size for size, _ in self.bandwidths]
        below = max((s for s in sizes if s <= nbytes), default=min(sizes, default=0))
        rates = [rate for size, rate in self.bandwidths if size >= below]
        return max([*rates, self.bandwidth_bytes_s])

    def as_json(self) -> dict[str, Any]:
        """The form in profile.json and of `--json`."""
        out: dict[str, Any] = jsonable(
            {
                "name": self.name,
                "kind": self.kind,
                "memory_bytes": self.memory_bytes,
                "bandwidth_bytes_s": self.bandwidth_bytes_s,
                "bandwidths": [{"bytes": n, "bytes_s": rate} for n, rate in self.bandwidths],
                "flop_s": {dtype: self.flop_s.get(dtype) for dtype in DTYPES},
                "launch_s": self.launch_s,
                "launch_sync_s": self.launch_sync_s,
                "measured": self.measured,
                "threads": self.threads,
                "versions": self.versions,
                "spread": self.spread,
            }
        )
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Device:
        """The inverse of as_json."""
        pairs = tuple((b["bytes"], b["bytes_s"]) for b in data["bandwidths"])
        return cls(**{**data, "bandwidths": pairs})


def device_of(text: str) -> Device:
    """The device that a person names (`H200`) or gives (`bandwidth=3.35e12,flops=990e12`).

    `flops` stands for bfloat16 and float16; a dtype's own name for that dtype. `memory` is in
    bytes, `launch` in seconds. Errors: USAGE.
    """
    if "=" in text:
        return _given(text)
    peak = peak_of(text)
    if peak is None:
        names = ", ".join(p.name for p in PEAKS)
        raise _refused(f"no device called {text!r} is known", f"one of {names}, or its numbers")
    return Device(
        peak.name, "cuda", peak.bandwidth_bytes_s, dict(peak.flop_s), memory_bytes=peak.memory_bytes
    )


def _given(text: str) -> Device:
    numbers: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in _NUMBERS or key in numbers:
            twice = "is stated twice" if key in numbers else "is no figure of a device"
            raise _refused(f"{key[:40]!r} {twice}", f"figures: {', '.join(_NUMBERS)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < 1e30:
            raise _refused(f"{key} is {value[:40]!r}", "a number above 0, as in 3.35e12")
        numbers[key] = number
    rates: dict[str, float | None] = {d: numbers[d] for d in DTYPES if d in numbers}
    if "flops" in numbers:
        rates = {"bfloat16": numbers["flops"], "float16": numbers["flops"], **rates}
    if "bandwidth" not in numbers or not rates:
        raise _refused("a device needs its bandwidth and a rate", "bandwidth=3.35e12,flops=990e12")
    return Device(
        text,
        "cuda",
        numbers["bandwidth"],
        rates,
        memory_bytes=int(numbers["memory"]) if "memory" in numbers else None,
        launch_s=numbers.get("launch"),
    )


def _refused(cause: str, fix: str) -> ParetronError:
    return ParetronError(Problem(Code.USAGE, cause, where="--device", fix=fix))
