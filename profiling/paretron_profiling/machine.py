"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from paretron_profiling import gpu


def hardware() -> dict[str, str | int | float]:
    """CPU, cores, memory, GPUs, system, date and how busy it is, for a report's caption."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or 0,
        "threads": len(psutil.Process().cpu_affinity() or [])
        if platform.system() == "Linux"
        else os.cpu_count() or 0,
        "memory_bytes": psutil.virtual_memory().total,
        **gpu.described(),
        "os": _os_name(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_1m": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def busy(found: Mapping[str, Any]) -> bool:
    """Whether more was running than there are cores, by what `hardware` found."""
    return float(found["load_1m"]) > int(found["threads"])


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"
