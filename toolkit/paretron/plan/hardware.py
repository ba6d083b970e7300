"""What this machine can do, found without torch: for estimates, not for reports."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from paretron.workers.devices import peak_flop_s

_UNKNOWN_GPU_FLOP_S = 100e12
# Training attains about this share of a device's rate; scoring about the same.
_ATTAINED = 0.4


@dataclass(frozen=True)
class Hardware:
    """One device as estimates see it: its name, attainable FLOP/s, memory in bytes."""

    name: str
    flop_s: float
    memory_bytes: int
    basis: str
    is_gpu: bool


def detect() -> Hardware:
    """The first NVIDIA GPU when there is one, else the CPU by a matrix product of 0.1 s."""
    return _gpu() or _cpu()


def _gpu() -> Hardware | None:
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        return None
    name, memory = (part.strip() for part in done.stdout.splitlines()[0].rsplit(",", 1))
    rate = peak_flop_s(name) or _UNKNOWN_GPU_FLOP_S
    return Hardware(
        name,
        rate * _ATTAINED,
        int(memory) << 20,
        f"{_ATTAINED:.0%} of the vendor's bf16 rate",
        is_gpu=True,
    )


def _cpu() -> Hardware:
    import numpy as np

    n = 768
    a = np.ones((n, n), dtype=np.float32)
    a @ a  # the first product starts the threads
    began, best = time.perf_counter(), float("inf")
    while (start := time.perf_counter()) - began < 0.1:
        a @ a
        best = min(best, time.perf_counter() - start)
    rate = 2 * n**3 / best
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        f"{os.cpu_count()} CPU cores",
        rate * _ATTAINED,
        memory,
        f"{_ATTAINED:.0%} of a measured fp32 matrix product",
        is_gpu=False,
    )


def written_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when it is not there."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the volume where `path` will be written."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
