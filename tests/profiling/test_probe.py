"""The device's probe: figures that can be true, in a process of its own, and honest failures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from paretron.errors import Code, ParetronError
from paretron_profiling.roofline import probe
from paretron_profiling.roofline.devices import DTYPES, Device
from paretron_profiling.roofline.probe import probe_device


@pytest.fixture(scope="module")
def device() -> Device:
    """What is here, measured once."""
    return probe_device()


def test_its_figures_can_be_true(device: Device) -> None:
    assert device.measured
    assert device.kind in ("cpu", "cuda")
    assert device.name
    assert 1e8 < device.bandwidth_bytes_s < 1e14
    rates = {d: r for d, r in device.flop_s.items() if r is not None}
    assert {"float32", "bfloat16"} <= set(rates) <= set(DTYPES)
    assert all(1e7 < rate < 1e17 for rate in rates.values())
    assert device.launch_s is not None
    assert 1e-9 < device.launch_s < 1e-2
    assert device.memory_bytes is not None
    assert device.memory_bytes > 1 << 28


def test_they_fit_each_other(device: Device) -> None:
    sizes = [size for size, _ in device.bandwidths]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] >= 16 << 20  # no small cache holds it
    assert device.bandwidths[-1][1] == device.bandwidth_bytes_s
    # A product of whole matrices reads each number many times: FLOPs outnumber the bytes of memory.
    assert (device.flop_s["float32"] or 0) > device.bandwidth_bytes_s / 4
    named = {"launch_s", *(f"bandwidth.{size}" for size in sizes)}
    named |= {f"flop_s.{d}" for d, rate in device.flop_s.items() if rate is not None}
    assert named <= set(device.spread)
    assert all(math.isfinite(s) and s >= 0 for s in device.spread.values())


def test_it_has_the_engines_threads(device: Device) -> None:
    if device.kind == "cpu":
        assert device.threads == 1  # of this folder's tests
    assert set(device.versions) >= {"python", "torch"}


def test_it_is_read_back(device: Device) -> None:
    assert Device.from_json(json.loads(json.dumps(device.as_json(), allow_nan=False))) == device


@pytest.mark.parametrize(
    ("python", "cause"),
    [
        ("/no/such/python", "could not start"),
        ("/bin/false", "ended with 1"),
        ("/bin/echo", "something else"),
    ],
)
def test_a_probe_that_fails_says_so(python: str, cause: str) -> None:
    with pytest.raises(ParetronError, match=cause) as caught:
        probe_device(python=Path(python))
    assert caught.value.problems[0].code is Code.ENGINE


def test_a_probe_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.3)
    with pytest.raises(ParetronError, match="no answer"):
        probe_device(python=python)
