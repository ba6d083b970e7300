"""Devices by their names, their numbers, and what was measured of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.errors import Code, ParetronError
from paretron.workers.devices import PEAKS, peak_flop_s, peak_of
from paretron_profiling.roofline.devices import Device, device_of

H100 = device_of("H100")
CPU = Device(
    "a CPU", "cpu", 1e10, {"float32": 1e11, "bfloat16": 5e10}, launch_s=1e-6, measured=True,
    bandwidths=((1 << 20, 5e10), (1 << 26, 2e10), (1 << 29, 1e10)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("driver", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"), ("NVIDIA H20", "H20"), ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("nvidia a10", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA A1000", None), ("4090", None),
    ],
)  # fmt: skip
def test_a_drivers_name_finds_its_row(driver: str, row: str | None) -> None:
    found = peak_of(driver)
    assert (found.name if found else None) == row
    assert peak_flop_s(driver) == (found.flop_s["bfloat16"] if found else None)


def test_the_table_is_in_order() -> None:
    assert len({p.name for p in PEAKS}) == len(PEAKS)
    for peak in PEAKS:
        assert device_of(peak.name).bandwidth_bytes_s == peak.bandwidth_bytes_s
        # Each FLOP of a matrix needs its operands: between 30 and 900 FLOPs a byte on every one.
        assert 30 < peak.flop_s["bfloat16"] / peak.bandwidth_bytes_s < 900
        assert peak.flop_s["float32"] < peak.flop_s["bfloat16"] < peak.flop_s["int8"]
        assert peak.flop_s.get("fp8", 0) <= peak.flop_s["int8"]


def test_a_device_by_its_numbers() -> None:
    device = device_of("bandwidth=2e12, flops=5e14, fp8=1e15, memory=8e10, launch=2e-6")
    assert device.flop_s == {"bfloat16": 5e14, "float16": 5e14, "fp8": 1e15}
    assert (device.memory_bytes, device.launch_s, device.measured) == (80_000_000_000, 2e-6, False)
    for each in (device, H100, CPU):
        assert Device.from_json(json.loads(json.dumps(each.as_json()))).as_json() == each.as_json()


@pytest.mark.parametrize(
    "text",
    ["", "H1000", "flops", "=,=", "bandwidth=1e12", "flops=1e12", "bandwidth=1e12,flops=-1",
     "bandwidth=nan,flops=1", "bandwidth=1,flops=1,speed=3", "bandwidth=1,bandwidth=1,flops=1"],
)  # fmt: skip
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(ParetronError) as caught:
        device_of(text)
    assert caught.value.problems[0].code is Code.USAGE


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 32))
def test_more_bytes_are_never_read_faster(a: int, b: int) -> None:
    least, most = sorted((a, b))
    assert CPU.bandwidth_of(least) >= CPU.bandwidth_of(most) >= CPU.bandwidth_bytes_s
    assert CPU.bandwidth_of(1) == 5e10
    assert CPU.bandwidth_of(1 << 30) == 1e10
    assert H100.bandwidth_of(a) == 3.35e12
