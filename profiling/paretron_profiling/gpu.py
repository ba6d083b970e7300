"""What NVIDIA GPUs draw, how fast they run and who else is on them; the only file with pynvml.

Without the library, its driver or a GPU there is nothing to watch, and no figure.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import psutil

from paretron_profiling.schema import GPU_SHARED, THROTTLED, GpuReading

EVERY_S = 0.1
# Reasons of NVML why the clock is lower than it could be: slowed down by hardware or by heat, or
# braked. A power limit is not among them: under full load it is how many GPUs always run.
THROTTLING = 0x8 | 0x20 | 0x40 | 0x80


@dataclass(frozen=True)
class Reading:
    """The GPUs at one moment: power in all, mean clock, counters where the GPU has them."""

    at_s: float
    power_w: float
    sm_clock_mhz: float
    throttled: bool = False
    energy_j: float | None = None
    used_bytes: int = 0
    pids: frozenset[int] = frozenset()


def condensed(readings: Sequence[Reading], *, seconds: float) -> GpuReading | None:
    """The reading of a stretch of time that the readings enclose; None without any.

    The counter of energy is exact where there is one; otherwise the mean power, each reading
    weighted by the time around it, is taken times the seconds.
    """
    if not readings:
        return None
    counted = [r.energy_j for r in readings if r.energy_j is not None]
    between = readings[-1].at_s - readings[0].at_s
    if len(counted) == len(readings) and len(counted) > 1 and between > 0:
        power = (counted[-1] - counted[0]) / between
    elif between > 0:
        power = sum(
            (b.at_s - a.at_s) * (a.power_w + b.power_w) / 2 for a, b in pairwise(readings)
        ) / between  # fmt: skip
    else:
        power = readings[0].power_w
    clock = sum(r.sm_clock_mhz for r in readings) / len(readings)
    return GpuReading(power_w=power, energy_j=power * seconds, sm_clock_mhz=clock)


@dataclass
class Watch:
    """A thread that reads the GPUs from time to time, and what it saw during a span."""

    read: Callable[[], Reading]
    every_s: float = EVERY_S
    _seen: list[Reading] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[Watch]:
        """Watch until the context ends."""
        thread = threading.Thread(target=self._loop, name="gpu-watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def begin(self) -> float:
        """Start a span, of which everything before is forgotten."""
        with self._lock:
            self._seen.clear()
        self._note()
        return perf_counter()

    def end(self, began_s: float) -> tuple[GpuReading | None, tuple[str, ...]]:
        """What the GPUs did since, and what makes it doubtful, as keys of FLAGS."""
        seconds = perf_counter() - began_s
        self._note()
        with self._lock:
            seen = tuple(self._seen)
        pids = frozenset[int]().union(*(r.pids for r in seen))
        found = {GPU_SHARED: bool(strangers(pids)), THROTTLED: any(r.throttled for r in seen)}
        return condensed(seen, seconds=seconds), tuple(k for k, holds in found.items() if holds)

    def peak_bytes(self) -> int:
        """The most memory that was in use since the span began."""
        with self._lock:
            return max((r.used_bytes for r in self._seen), default=0)

    def _note(self) -> None:
        reading = self.read()
        with self._lock:
            self._seen.append(reading)

    def _loop(self) -> None:
        while not self._ended.wait(self.every_s):
            self._note()


def strangers(pids: frozenset[int]) -> frozenset[int]:
    """Those of other processes than this one and its children.

    Numbers that mean nothing here are left out: a container may see those of its host.
    """
    if not pids:
        return pids
    own = psutil.Process()
    ours = {own.pid, *(child.pid for child in own.children(recursive=True))}
    return frozenset(pid for pid in pids - ours if psutil.pid_exists(pid))


def find_watch() -> Watch | None:
    """A watch over the GPUs that this process may use; None where there are none."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handles = list(_visible(nvml))
        if not handles:
            return None
        _read(nvml, handles)
    except nvml.NVMLError:  # no driver, or one that keeps these figures to itself
        return None
    return Watch(lambda: _read(nvml, handles))


def described() -> dict[str, str | int]:
    """Name, number and driver of the GPUs that this process may use; empty without."""
    try:
        import pynvml as nvml
    except ImportError:
        return {}
    try:
        nvml.nvmlInit()
        names = [str(nvml.nvmlDeviceGetName(handle)) for handle in _visible(nvml)]
        driver = str(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError:
        return {}
    if not names:
        return {}
    return {"gpu": ", ".join(dict.fromkeys(names)), "gpus": len(names), "gpu_driver": driver}


def free_bytes() -> int | None:
    """Free memory of the GPUs that this process may use, the smallest of them; None without."""
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        return min(
            (int(nvml.nvmlDeviceGetMemoryInfo(h).free) for h in _visible(nvml)), default=None
        )
    except nvml.NVMLError:
        return None


def _visible(nvml: Any) -> Iterator[Any]:
    """The handles of all GPUs, or of those that CUDA_VISIBLE_DEVICES names."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is None:
        yield from (nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()))
        return
    for name in filter(None, map(str.strip, stated.split(","))):
        if name.isdecimal():
            yield nvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith(("GPU-", "MIG-")):
            yield nvml.nvmlDeviceGetHandleByUUID(name)
        else:  # as CUDA reads it: -1 or nonsense ends the list
            return


def _read(nvml: Any, handles: Sequence[Any]) -> Reading:
    return Reading(
        at_s=perf_counter(),
        power_w=sum(nvml.nvmlDeviceGetPowerUsage(h) for h in handles) / 1e3,
        sm_clock_mhz=sum(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM) for h in handles)
        / len(handles),
        throttled=any(
            nvml.nvmlDeviceGetCurrentClocksThrottleReasons(h) & THROTTLING for h in handles
        ),
        energy_j=_energy_j(nvml, handles),
        used_bytes=sum(int(nvml.nvmlDeviceGetMemoryInfo(h).used) for h in handles),
        pids=frozenset(
            process.pid for h in handles for process in nvml.nvmlDeviceGetComputeRunningProcesses(h)
        ),
    )


def _energy_j(nvml: Any, handles: Sequence[Any]) -> float | None:
    """Of the counters, which GPUs before Volta lack."""
    try:
        return float(sum(nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles)) / 1e3
    except nvml.NVMLError_NotSupported:
        return None
