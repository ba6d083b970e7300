"""Measures the device that torch sees here: a program of its own, which prints one JSON object.

It is short on purpose: a figure is the best of a few runs, as a bound has to be, and its spread is
said beside it. Reading is a sum and a matrix-vector product over the same bytes, whichever is
faster; a rate is that of one product of square matrices.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

# Reading again and again from caches of any level, and from memory alone.
_SIZES = (256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_LEAST_STREAM, _MOST_STREAM = 256 << 20, 1 << 30
_ROW = 512  # values in a row of the matrix that is read
_SECONDS = 0.01  # what one timing of a quick thing should take at least
_REPEATS = 5  # at least
# What one figure may take: on a CPU others use the cores for a while, and the best is wanted.
_FIGURE_SECONDS = {"cpu": 0.1, "cuda": 0.02}
_LAUNCHES = 1000


class Probe:
    """One device: how to wait for it, and what was measured on it."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.spread: dict[str, float] = {}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, name: str, call: Callable[[], object], *, times: int = 1) -> float:
        """The shortest time of one call out of repeats of `times` calls; notes their spread."""
        call()
        self.wait()
        found: list[float] = []
        until = time.perf_counter() + _FIGURE_SECONDS[self.device.type]
        while len(found) < _REPEATS or time.perf_counter() < until:
            began = time.perf_counter()
            for _ in range(times):
                call()
            self.wait()
            found.append((time.perf_counter() - began) / times)
        self.spread[name] = (max(found) - min(found)) / median(found)
        return min(found)

    def calls(self, call: Callable[[], object]) -> int:
        """How many calls take _SECONDS, so that the clock and the launch do not matter."""
        call()
        self.wait()
        began = time.perf_counter()
        call()
        self.wait()
        return max(1, int(_SECONDS / max(time.perf_counter() - began, 1e-7)))

    def bandwidths(self) -> list[dict[str, float]]:
        """Bytes a second of reading so many bytes again and again, the largest from memory."""
        largest = self.stream_bytes()
        whole = torch.ones(largest // 4, device=self.device)
        found = []
        for size in (*(s for s in _SIZES if s < largest), largest):
            values = whole[: size // 4]
            matrix, vector = values.view(-1, _ROW), values[:_ROW]
            name = f"bandwidth.{size}"
            best, spread = 0.0, 0.0
            for read in (lambda v=values: v.sum(), lambda m=matrix, v=vector: torch.mv(m, v)):
                rate = size / self.seconds(name, read, times=self.calls(read))
                if rate > best:
                    best, spread = rate, self.spread[name]
            self.spread[name] = spread
            found.append({"bytes": size, "bytes_s": best})
        return found

    def stream_bytes(self) -> int:
        """Twice the last cache, and no more than an eighth of what memory is free."""
        if self.cuda:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            free = torch.cuda.mem_get_info()[0]
        else:
            cache = _last_cache()
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        wanted = min(max(2 * cache, _LEAST_STREAM), _MOST_STREAM)
        return int(min(wanted, max(free // 8, 16 << 20))) // (4 * _ROW) * (4 * _ROW)

    def rates(self) -> dict[str, float | None]:
        """Dense FLOPs a second of square matrices by dtype; None where torch has no product."""
        n = 8192 if self.cuda else 1024
        one = torch.ones((), device=self.device)
        # Random: a GPU multiplies equal numbers with less power, and so faster than any model's.
        numbers = torch.randn((n, n), device=self.device)

        def plain(dtype: torch.dtype) -> Callable[[], object]:
            a = numbers.to(dtype)
            return lambda: a @ a

        def whole_numbers() -> Callable[[], object]:
            a = (32 * numbers).to(torch.int8)
            return lambda: torch._int_mm(a, a.t())

        def eight_bits() -> Callable[[], object]:
            a = numbers.to(torch.float8_e4m3fn)
            return lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16)

        makers: dict[str, Callable[[], Callable[[], object]]] = {
            "float32": lambda: plain(torch.float32),
            "bfloat16": lambda: plain(torch.bfloat16),
            "float16": lambda: plain(torch.float16),
            "int8": whole_numbers,
            "fp8": eight_bits,
        }
        found: dict[str, float | None] = {}
        for dtype, maker in makers.items():
            try:
                call = maker()
                name = f"flop_s.{dtype}"
                found[dtype] = 2 * n**3 / self.seconds(name, call, times=self.calls(call))
            except (RuntimeError, NotImplementedError):  # no kernel for this dtype here
                found[dtype] = None
        return found

    def launches(self) -> tuple[float, float | None]:
        """Seconds of one more small operation in a chain, and with waiting for it (CUDA alone).

        In a chain the clock stops when the last one was handed over, not when it has run.
        """
        x, y = torch.ones(16, device=self.device), torch.ones(16, device=self.device)
        torch.add(x, y)
        chains = []
        for _ in range(2 * _REPEATS):
            self.wait()
            began = time.perf_counter()
            for _ in range(_LAUNCHES):
                torch.add(x, y)
            chains.append((time.perf_counter() - began) / _LAUNCHES)
        self.spread["launch_s"] = (max(chains) - min(chains)) / median(chains)
        if not self.cuda:
            return median(chains), None
        waited = []
        for _ in range(200):
            self.wait()
            began = time.perf_counter()
            torch.add(x, y)
            self.wait()
            waited.append(time.perf_counter() - began)
        return median(chains), median(waited)

    def about(self) -> dict[str, Any]:
        """The device's name and memory, threads and versions."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        if self.cuda:
            found = torch.cuda.get_device_properties(self.device)
            return {
                "name": found.name, "kind": "cuda", "memory_bytes": found.total_memory,
                "threads": None, "versions": versions | {"cuda": str(torch.version.cuda)},
            }  # fmt: skip
        threads = torch.get_num_threads()
        return {
            "name": _cpu_name(), "kind": "cpu", "threads": threads, "versions": versions,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }  # fmt: skip


def _last_cache() -> int:
    """Bytes of the largest cache that Linux tells of; 0 elsewhere."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        found.append(int(text.rstrip("KM")) * unit)
    return max(found)


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    """Measure and print."""
    probe = Probe()
    with torch.inference_mode():
        launch_s, launch_sync_s = probe.launches()
        bandwidths = probe.bandwidths()
        flop_s = probe.rates()
    figures = {
        "bandwidth_bytes_s": bandwidths[-1]["bytes_s"],
        "bandwidths": bandwidths,
        "flop_s": flop_s,
        "launch_s": launch_s,
        "launch_sync_s": launch_sync_s,
        "measured": True,
        "spread": probe.spread,
    }
    json.dump(probe.about() | figures, sys.stdout)


if __name__ == "__main__":
    main()
