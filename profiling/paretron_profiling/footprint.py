"""The most memory that an engine took with one model, read from the kernel's own marks.

An engine with a process of its own is counted whole, its children with it. Of one that runs in
this process, where several models may be loaded, only what it added since its opening counts: what
the interpreter and the libraries take is no part of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from paretron_profiling.schema import Workload

_RESET_PEAK = "5"  # written to /proc/PID/clear_refs: the peak is then what is in use now


@dataclass(frozen=True)
class MemoryPeak:
    """What loading a model and running its heaviest workload once took at most.

    host_bytes are resident; device_bytes were added on the GPUs. None is what cannot be read here.
    own_process says whether all of the engine's process is counted, or what it added to ours.
    """

    model: str
    work: Workload
    host_bytes: int | None
    device_bytes: int | None
    own_process: bool

    def to_json(self) -> dict[str, Any]:
        """The JSON form, flat."""
        rest = {k: v for k, v in self.__dict__.items() if k not in ("model", "work")}
        return {"model": self.model, **asdict(self.work), **rest}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MemoryPeak:
        """The inverse of to_json."""
        keys = ("engine", "mode", "load", "input_len", "output_len")
        rest = {k: v for k, v in data.items() if k not in keys}
        return cls(work=Workload(*(data[k] for k in keys)), **rest)


class HostMark:
    """Where this process's memory stood before an engine was opened."""

    def __init__(self) -> None:
        _give_back()
        self._before = psutil.Process().memory_info().rss
        self._can_reset = _reset_peak()

    def peak_bytes(self, pid: int | None) -> int | None:
        """The peak since, of the engine that runs in `pid`; None where it is not known."""
        if pid is None:
            return None
        if pid != os.getpid():
            return _tree_peak(pid)
        peak = _peak(pid)
        if peak is None or not self._can_reset:
            return None
        return max(0, peak - self._before)


def _give_back() -> None:
    """Return what the C library keeps of freed memory: using it again would go unseen."""
    with suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Whether this process's peak could be set to what it holds now."""
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except OSError:  # another system than Linux, or one that does not allow it
        return False
    return True


def _tree_peak(pid: int) -> int | None:
    """The sum of the peaks of a process and its children; pages that they share count often."""
    found = [peak for process in _tree(pid) if (peak := _peak(process)) is not None]
    return sum(found) if found else None


def _tree(pid: int) -> Iterator[int]:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        yield pid
        yield from (child.pid for child in process.children(recursive=True))


def _peak(pid: int) -> int | None:
    """VmHWM of a process: the most that was resident at once."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if found is None else 1024 * int(found)
