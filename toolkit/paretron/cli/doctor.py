"""`paretron doctor`: is this machine ready, and what is missing."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from paretron.cli import options as o
from paretron.cli.output import bytes_text, say_json
from paretron.errors import Code, ParetronError, Problem
from paretron.versions import SAFE_FLOORS, installed, release

OPTIONAL = ("onnxruntime", "onnxruntime-genai", "onnx", "vllm", "nvidia-modelopt", "lm-eval")
TOOLS = ("nvidia-smi", "trtllm-build", "torchrun")
_PROBE_TIMEOUT_S = 60
# The distribution of vLLM for CPUs has another name.
_PROBE = """
import importlib.metadata as m, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    for spelling in (name, name + "-cpu"):
        if any(True for _ in m.distributions(name=spelling)):
            found.setdefault(name, m.version(spelling))
print(json.dumps(found))
"""


def doctor(
    python: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE=PATH", help="The interpreter of an engine with its own environment."
        ),
    ] = None,
    as_json: o.Json = False,
) -> int:
    """Show versions, devices, engines and disk; exit 6 when a version has a known vulnerability."""
    from paretron.plan.hardware import detect, free_disk_bytes
    from paretron.plugins import EXPORTERS, plugin_names

    pythons = dict(_named(text) for text in python or ())
    packages = {n: installed(n) for n in ("paretron", "torch", "transformers", "safetensors")}
    packages |= {n: installed(n) for n in OPTIONAL}
    environments = {name: _packages_of(path) for name, path in pythons.items()}
    old = below_floor(packages) + [
        f"{name}: {package}"
        for name, found in environments.items()
        for package in below_floor(found or {})
    ]
    hardware = detect()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "floors": SAFE_FLOORS,
        "below_floor": old,
        "device": hardware.name,
        "is_gpu": hardware.is_gpu,
        "memory_bytes": hardware.memory_bytes,
        "disk_free_bytes": free_disk_bytes(Path.cwd()),
        "exporters": plugin_names(EXPORTERS),
        "engines": _engines(pythons, environments),
        "tools": {t: shutil.which(t) for t in TOOLS},
    }
    if as_json:
        say_json(facts)
    else:
        _show(facts)
    return Code.OPTIONAL_OLD.exit if old else 0


def below_floor(versions: Mapping[str, str | None]) -> list[str]:
    """The packages in which a known vulnerability is open."""
    return [
        name
        for name, floor in SAFE_FLOORS.items()
        if (found := versions.get(name)) and release(found) < release(floor)
    ]


def _named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ParetronError(
            Problem(
                Code.USAGE,
                f"{text[:80]!r} is not ENGINE=PATH",
                where="--python",
                fix="for example --python vllm=/opt/vllm/bin/python",
            )
        )
    return name, Path(path).absolute()  # not resolved: an environment is known by its link's place


def _packages_of(python: Path) -> dict[str, str] | None:
    """The versions that matter in another interpreter; None when it does not run."""
    command = [str(python), "-I", "-c", _PROBE, json.dumps([*SAFE_FLOORS])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return found


def _engines(
    pythons: Mapping[str, Path], environments: Mapping[str, Mapping[str, str] | None]
) -> dict[str, dict[str, Any]]:
    """What keeps each installed engine from running, in the interpreter that was named for it."""
    from paretron.plugins import ENGINES, find_plugin, plugin_names
    from paretron.recipe import Engine

    out: dict[str, dict[str, Any]] = {}
    for name in pythons:
        find_plugin(ENGINES, name, where="--python")  # says which there are
    for name in plugin_names(ENGINES):
        python = pythons.get(name)
        try:
            engine = find_plugin(ENGINES, name, where="engines")
            problems = engine.check(Engine(name=name, python=python))
        except ParetronError as error:
            problems = list(error.problems)
        out[name] = {
            "ready": not problems,
            "problems": [p.as_json() for p in problems],
            "python": str(python) if python else None,
            "packages": environments.get(name),
        }
    return out


def _show(found: Mapping[str, Any]) -> None:
    print(f"python      {found['python']} ({found['interpreter']}), {found['platform']}")
    for name, version in found["packages"].items():
        note = _note(found["below_floor"], name)
        print(f"{name:<18}{version or 'not installed'}{note}")
    print(f"device      {found['device']}, {bytes_text(found['memory_bytes'])} of memory")
    print(f"disk        {bytes_text(found['disk_free_bytes'])} free here")
    print(f"exporters   {', '.join(found['exporters'])}")
    print("engines")
    for name, engine in found["engines"].items():
        print(f"  {name:<22}{'ready' if engine['ready'] else engine['problems'][0]['cause']}")
        for package, version in (engine["packages"] or {}).items():
            print(f"    {package:<14}{version}{_note(found['below_floor'], f'{name}: {package}')}")
    for tool, path in found["tools"].items():
        print(f"{tool:<18}{path or 'not on the path'}")


def _note(below: list[str], name: str) -> str:
    floor = SAFE_FLOORS.get(name.rpartition(" ")[2])
    return f"  a known vulnerability is open below {floor}" if name in below else ""
