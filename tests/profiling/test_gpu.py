"""What is made of a GPU's readings, from recorded ones: there is none where these tests run."""
# ruff: noqa: N801, N802 (the names are pynvml's)

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron_profiling import gpu, machine
from paretron_profiling.gpu import Reading, Watch, condensed, find_watch, free_bytes, strangers

# Seconds, watts, MHz, and the counter of joules, as an H100 under a growing load gives them.
RECORDED = [
    (10.0, 120.0, 1980.0, 5000.0),
    (10.1, 480.0, 1980.0, 5030.0),
    (10.2, 620.0, 1755.0, 5085.0),
    (10.4, 640.0, 1740.0, 5211.0),
]


def readings(*, counted: bool) -> list[Reading]:
    return [
        Reading(at, watts, clock, energy_j=joules if counted else None)
        for at, watts, clock, joules in RECORDED
    ]


def test_the_counter_of_energy_is_believed_where_there_is_one() -> None:
    found = condensed(readings(counted=True), seconds=0.4)
    assert found is not None
    assert found.energy_j == pytest.approx(211.0)
    assert found.power_w == pytest.approx(211.0 / 0.4)
    assert found.sm_clock_mhz == pytest.approx((1980 + 1980 + 1755 + 1740) / 4)


def test_without_one_the_power_is_summed_up() -> None:
    found = condensed(readings(counted=False), seconds=0.4)
    assert found is not None
    expected = 0.1 * 300 + 0.1 * 550 + 0.2 * 630
    assert found.energy_j == pytest.approx(expected)
    assert found.power_w == pytest.approx(expected / 0.4)


def test_of_one_reading_the_power_is_all_there_is() -> None:
    found = condensed(readings(counted=True)[:1], seconds=0.5)
    assert found is not None
    assert (found.power_w, found.energy_j) == (120.0, 60.0)
    assert condensed([], seconds=1.0) is None


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.floats(1, 1000))
def test_constant_power_is_found(steps: list[float], watts: float) -> None:
    at = [sum(steps[:k]) for k in range(len(steps) + 1)]
    found = condensed([Reading(t, watts, 1500.0) for t in at], seconds=sum(steps))
    assert found is not None
    assert found.power_w == pytest.approx(watts)
    assert found.energy_j == pytest.approx(watts * sum(steps))


@pytest.fixture
def other_process() -> Iterator[int]:
    """The number of a living process that is no child of ours: its parent has ended."""
    code = (
        "import subprocess, sys\n"
        "sleeper = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}\n"
        "print(subprocess.Popen(sleeper, start_new_session=True, **quiet).pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    yield pid
    os.kill(pid, 9)


def test_who_else_is_on_the_gpu(other_process: int) -> None:
    own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert strangers(frozenset({os.getpid(), own.pid})) == frozenset()
        # A number that no process here has means nothing: a container sees its host's.
        assert strangers(frozenset({own.pid, other_process, 2**22 + 5})) == {other_process}
    finally:
        own.kill()
        own.wait()


def test_a_watch_says_what_it_saw_during_a_span(other_process: int) -> None:
    state = SimpleNamespace(throttled=True, pids=frozenset({other_process}), used=900, reads=0)

    def read() -> Reading:
        state.reads += 1
        return Reading(
            float(state.reads), 100.0, 1500.0, state.throttled, None, state.used, state.pids
        )

    with Watch(read, every_s=0.01).running() as watch:
        began = watch.begin()
        deadline = monotonic() + 30
        while state.reads < 4 and monotonic() < deadline:
            sleep(0.01)
        found, doubts = watch.end(began)
        assert found is not None
        assert found.power_w == pytest.approx(100.0)
        assert doubts == ("gpu_shared", "throttled")
        assert watch.peak_bytes() == 900
        state.throttled, state.pids, state.used = False, frozenset({os.getpid()}), 500
        began = watch.begin()
        assert watch.end(began)[1] == ()
        assert watch.peak_bytes() == 500
    reads = state.reads
    sleep(0.05)
    assert state.reads == reads


class FakeNvml:
    """The part of pynvml that is used, with two GPUs of recorded values."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, *, reasons: int = 0, counts_energy: bool = True) -> None:
        self.reasons, self.counts_energy = reasons, counts_energy

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        return {"GPU-a": 0, "GPU-b": 1}[name]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return (250_500, 300_500)[handle]  # milliwatts

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return (1980, 1740)[handle]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counts_energy:
            raise self.NVMLError_NotSupported
        return (7_000_000, 5_000_000)[handle]  # millijoules

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(10, 20)[handle], free=(70, 60)[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=(11, 12)[handle])]


def test_units_and_sums_of_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = find_watch()
    assert watch is not None
    found = watch.read()
    assert (found.power_w, found.sm_clock_mhz, found.energy_j) == (551.0, 1860.0, 12000.0)
    assert (found.used_bytes, found.pids, found.throttled) == (30, frozenset({11, 12}), False)
    assert free_bytes() == 60
    gpus = {"gpu": "NVIDIA H100", "gpus": 2, "gpu_driver": "580.1"}
    assert gpus.items() <= machine.hardware().items()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gpus.keys() & machine.hardware().keys()


@pytest.mark.parametrize(
    ("stated", "used"), [("1", 20), ("GPU-a", 10), ("1,0", 30), ("0,-1,1", 10), ("", None)]
)
def test_only_the_gpus_that_may_be_used(
    stated: str, used: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", stated)
    watch = find_watch()
    assert (None if watch is None else watch.read().used_bytes) == used


@pytest.mark.parametrize(
    ("reasons", "throttled"), [(0x1, False), (0x4, False), (0x8, True), (0x40, True), (0x24, True)]
)
def test_a_power_limit_is_no_throttling(
    reasons: int, throttled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(reasons=reasons, counts_energy=False))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    watch = find_watch()
    assert watch is not None
    assert watch.read().throttled is throttled
    assert watch.read().energy_j is None


def test_without_the_library_or_a_gpu_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_watch() is None
    assert free_bytes() is None

    class Driverless(FakeNvml):
        def nvmlInit(self) -> None:
            raise self.NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", Driverless())
    assert find_watch() is None
    assert free_bytes() is None
    assert gpu.EVERY_S >= 0.05  # a modest rate
