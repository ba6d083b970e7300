"""`paretron doctor`: is this machine ready, and what is missing."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from paretron.cli import options as o
from paretron.cli.output import bytes_text, say_json
from paretron.versions import SAFE_FLOORS, installed, release

OPTIONAL = ("onnxruntime", "onnxruntime-genai", "onnx", "vllm", "nvidia-modelopt", "lm-eval")


def doctor(as_json: o.Json = False) -> int:
    """Show versions, devices, engines and disk; exit 6 when a version has a known vulnerability."""
    from paretron.plan.hardware import detect, free_disk_bytes
    from paretron.plugins import ENGINES, EXPORTERS, plugin_names

    packages = {n: installed(n) for n in ("paretron", "torch", "transformers", "safetensors")}
    packages |= {n: installed(n) for n in OPTIONAL}
    old = [
        name
        for name, floor in SAFE_FLOORS.items()
        if (found := packages.get(name)) and release(found) < release(floor)
    ]
    hardware = detect()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "below_floor": old,
        "device": hardware.name,
        "memory_bytes": hardware.memory_bytes,
        "disk_free_bytes": free_disk_bytes(Path.cwd()),
        "exporters": plugin_names(EXPORTERS),
        "engines": plugin_names(ENGINES),
        "tools": {t: shutil.which(t) for t in ("nvidia-smi", "trtllm-build", "torchrun")},
    }
    if as_json:
        say_json(facts)
    else:
        _show(facts)
    return 6 if old else 0


def _show(found: dict[str, Any]) -> None:
    print(f"python      {found['python']} ({found['interpreter']}), {found['platform']}")
    for name, version in found["packages"].items():
        note = "  below the floor for known vulnerabilities" if name in found["below_floor"] else ""
        print(f"{name:<18}{version or 'not installed'}{note}")
    print(f"device      {found['device']}, {bytes_text(found['memory_bytes'])} of memory")
    print(f"disk        {bytes_text(found['disk_free_bytes'])} free here")
    print(f"exporters   {', '.join(found['exporters'])}")
    print(f"engines     {', '.join(found['engines'])}")
    for tool, path in found["tools"].items():
        print(f"{tool:<18}{path or 'not on the path'}")
