"""Peak memory: of a process of its own, and of what was added to ours."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from paretron_profiling import footprint
from paretron_profiling.footprint import HostMark, MemoryPeak
from paretron_profiling.schema import Workload

MB = 1 << 20
linux_only = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="this kernel keeps no such marks"
)


@linux_only
def test_what_was_added_here_counts_after_it_is_gone() -> None:
    earlier = bytearray(os.urandom(1)) * (96 * MB)
    del earlier  # a peak from before the mark is none of the engine's
    mark = HostMark()
    kept = bytearray(b"x") * (20 * MB)
    passing = bytearray(b"x") * (40 * MB)
    del passing
    peak = mark.peak_bytes(os.getpid())
    assert peak is not None
    assert 55 * MB < peak < 75 * MB
    assert len(kept) == 20 * MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library keeps its own way")
@linux_only
def test_memory_that_is_used_again_counts() -> None:
    def blocks() -> list[bytes]:
        return [b"x" * 65536 for _ in range(1000)]  # too small to be mapped one by one

    earlier = blocks()
    above = b"x" * 65536  # keeps the heap from shrinking when what lies below it is freed
    del earlier
    mark = HostMark()
    again = blocks()
    peak = mark.peak_bytes(os.getpid())
    assert peak is not None
    assert peak > 55 * MB
    assert (len(again), len(above)) == (1000, 65536)


@linux_only
def test_a_process_of_its_own_is_counted_with_its_children() -> None:
    hold = "import sys, time; held = bytearray(b'x') * ({} << 20); print(flush=True); {}"
    child = hold.format(30, "time.sleep(60)")
    code = hold.format(50, "") + (
        f"\nimport subprocess\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])"
        "\ntry: time.sleep(60)\nfinally: child.kill()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            for _ in range(2):  # each says that it holds its bytes
                process.stdout.readline()
            peak = HostMark().peak_bytes(process.pid)
        finally:
            process.send_signal(2)
    assert peak is not None
    assert 80 * MB < peak < 130 * MB


def test_what_cannot_be_read_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HostMark().peak_bytes(None) is None
    monkeypatch.setattr(footprint, "_reset_peak", lambda: False)
    assert HostMark().peak_bytes(os.getpid()) is None
    monkeypatch.setattr(footprint, "_peak", lambda pid: None)
    assert HostMark().peak_bytes(os.getppid()) is None


def test_json_and_back() -> None:
    peak = MemoryPeak("m", Workload.at_once("e", 2, 6, 4), 100, None, own_process=True)
    flat = peak.to_json()
    assert (flat["load"], flat["input_len"], flat["device_bytes"]) == (2, 6, None)
    assert MemoryPeak.from_json(flat) == peak
