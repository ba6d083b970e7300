"""What there is to compare of a run, an artifact, a profile or a report: facts by part and key.

Nothing but JSON and the headers of weights is read, and nothing of it is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paretron.artifacts.config import read_config
from paretron.artifacts.guard import inside
from paretron.artifacts.jsonfile import read_object
from paretron.artifacts.manifest import MANIFEST, read_manifest
from paretron.artifacts.shards import INDEX, SINGLE, entries_of, weight_files
from paretron.errors import Code, ParetronError, Problem

Kind = Literal["run", "report", "profile", "evaluation", "checkpoint", "artifact"]
Scalar = str | int | float | bool | None

REPORT, PROFILE, EVALUATION = "report.json", "profile.json", "evaluation.json"
_SIZES = ("params", "non_embedding_params", "weight_bytes", "kv_bytes_per_token")
_WORK = ("engine", "mode", "load", "input_len", "output_len")
_MAX_BYTES, _MAX_NODES = 1 << 30, 10_000_000  # a profile holds every raw time


@dataclass(frozen=True)
class Fact:
    """A value, and of what was measured the interval that it is known within."""

    value: Scalar
    low: float | None = None
    high: float | None = None


Part = dict[str, Fact]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: what it is, and its facts, by part and key."""

    place: Path
    kind: Kind
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = field(default=())


def read_side(place: Path) -> Side:
    """Everything of a run, an artifact or one of the two files that can be compared.

    Errors: INPUT_MISSING when it is none of these, INPUT_MANIFEST for a manifest that was changed,
    INPUT_CONFIG and others for files that are not what Paretron writes.
    """
    if place.is_file():
        readers: Mapping[str, Callable[[Path], Side]] = {REPORT: _report, PROFILE: _profile}
        if place.name not in readers:
            raise _unknown(place, f"a file that is neither {REPORT} nor {PROFILE}")
        return _trusted(place, readers[place.name])
    if not place.is_dir():
        raise _unknown(place, "nothing is here")
    if (place / "recipe.json").is_file() and (place / "plan.json").is_file():
        return _trusted(place, _run)
    if (place / MANIFEST).is_file():
        return _trusted(place, _artifact)
    if (place / "config.json").is_file():
        return _trusted(place, _foreign)
    raise _unknown(place, f"no run, no {MANIFEST} and no config.json here")


def _trusted(place: Path, read: Callable[[Path], Side]) -> Side:
    """What a reader makes of a place; INPUT_CONFIG where what it holds has another shape."""
    try:
        return read(place)
    except (
        ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise ParetronError(
            Problem(
                Code.INPUT_CONFIG,
                f"not what this version of Paretron writes: {type(error).__name__}: "
                f"{str(error)[:120]}",
                where=str(place),
                fix="make it again with this version",
            )
        ) from error


def _run(folder: Path) -> Side:
    recipe = read_object(folder / "recipe.json", code=Code.INPUT_CONFIG)
    parts: dict[str, Part] = {"recipe": exact(recipe), "weights": {}}
    notes: tuple[str, ...] = ()
    for stage in sorted((folder / "stages").glob("*/" + MANIFEST)):
        files = read_manifest(stage.parent)["files"]
        parts["weights"] |= {
            f"{stage.parent.name}/{name}": Fact(entry["sha256"])
            for name, entry in files.items()
            if name.endswith(".safetensors")
        }
    if (folder / "report" / REPORT).is_file():
        parts |= _report(folder / "report" / REPORT).parts
    else:
        notes = (f"{folder} has no report yet: only what is there is compared",)
    return Side(folder, "run", parts, notes)


def _report(path: Path) -> Side:
    content = _json(path)
    parts: dict[str, Part] = {
        name: {} for name in ("sizes", "shapes", "losses", "tasks", "speeds", "speedups", "goals")
    }
    for model in content["models"]:
        name = model["name"]
        parts["sizes"] |= {f"{name}.{k}": Fact(model[k]) for k in _SIZES}
        parts["sizes"] |= {
            f"{name}.{a['to']}.bytes": Fact(a["bytes"]) for a in model.get("artifacts", ())
        }
        parts["shapes"] |= {f"{name}.{k}": f for k, f in exact(model["shape"]).items()}
        parts["losses"] |= _losses(name, model.get("texts", {}))
        pruned = model["loss"].get("pruned")
        parts["losses"] |= {f"{name}.pruned": Fact(pruned)} if pruned is not None else {}
        parts["tasks"] |= _tasks(name, model.get("tasks", {}))
        for speed in model["speed"]:
            parts["speeds"] |= _speeds(name, speed)
    parts["speedups"] = _speedups(content["speedup"])
    for goal in content.get("goals", ()):
        parts["goals"][f"{goal['model']}: {goal['figure']}"] = Fact(goal["verdict"])
    return Side(path, "report", parts | _surroundings(content))


def _profile(path: Path) -> Side:
    content = _json(path)
    speeds: Part = {}
    for name, measured in content["models"].items():
        for speed in measured:
            speeds |= _speeds(name, speed)
    parts = {"speeds": speeds, "speedups": _speedups(content["speedup"])}
    return Side(path, "profile", parts | _surroundings(content))


def _artifact(folder: Path) -> Side:
    manifest = read_manifest(folder)
    settings = {k: manifest[k] for k in ("kind", "seed", "stamp", "settings")}
    parts: dict[str, Part] = {
        "settings": exact(settings),
        "versions": exact(manifest["versions"]),
        "inputs": exact(manifest["parents"]),
        "files": {name: Fact(entry["sha256"]) for name, entry in manifest["files"].items()},
    }
    kind: Kind = "artifact"
    for name, read in ((REPORT, _report), (PROFILE, _profile)):
        if (folder / name).is_file():
            side = read(folder / name)
            kind, parts = side.kind, {**parts, **side.parts}
    if (folder / EVALUATION).is_file():
        kind = "evaluation"
        content = _json(folder / EVALUATION)
        parts["losses"] = _losses("", content["texts"])
        parts["tasks"] = _tasks("", content.get("tasks", {}))
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        kind, parts = "checkpoint", parts | _checkpoint(folder)
    return Side(folder, kind, parts)


def _foreign(folder: Path) -> Side:
    """A checkpoint that somebody else wrote: no sum is known of its bytes."""
    note = f"{folder} has no {MANIFEST}: whether bytes are equal is not known"
    return Side(folder, "checkpoint", _checkpoint(folder), (note,))


def _checkpoint(folder: Path) -> dict[str, Part]:
    tensors = entries_of(weight_files(folder))
    sizes = {
        "tensors": Fact(len(tensors)),
        "values": Fact(sum(math.prod(e.shape) for e in tensors.values())),
        "bytes": Fact(sum(e.nbytes for e in tensors.values())),
    }
    return {
        "config": exact(read_config(folder)),
        "sizes": sizes,
        "tensors": {n: Fact(f"{e.dtype} {list(e.shape)}") for n, e in tensors.items()},
    }


def _surroundings(content: Mapping[str, Any]) -> dict[str, Part]:
    """What the figures of a report or a profile were taken with and on."""
    versions = {k: content[k] for k in ("versions", "engines") if k in content}
    # When it was measured and how busy the machine was differ always.
    machine = {k: v for k, v in content["hardware"].items() if k not in ("date", "load_1m")}
    return {
        "versions": exact(versions),
        "hardware": exact(machine),
        "method": exact(content["method"]),
    }


def _losses(model: str, texts: Mapping[str, Any]) -> Part:
    return {
        _named(model, text): _within(found["loss"], found.get("low"), found.get("high"))
        for text, found in texts.items()
    }


def _tasks(model: str, tasks: Mapping[str, Any]) -> Part:
    return {
        f"{_named(model, task)} ({found['metric']})": _within(
            found["value"], found.get("low"), found.get("high")
        )
        for task, found in tasks.items()
    }


def _speeds(model: str, measured: Mapping[str, Any]) -> Part:
    """The figures of one measurement, each with its interval, or the range of its repeats."""
    engine, mode, load, input_len, output_len = (measured[key] for key in _WORK)
    at = f"{model}, {engine}, {mode} {load:g}, {input_len}+{output_len}"
    known = {**measured["ranges"], **measured.get("intervals", {})}
    return {
        f"{at}: {figure}": _within(measured[figure], *known[figure])
        for figure in measured["ranges"]
        if measured.get(figure) is not None
    }


def _speedups(rows: list[Mapping[str, Any]]) -> Part:
    return {
        f"{r['model']}, {r['engine']}, {r['rule']}, {r['mode']} {r['load']:g} to "
        f"{r['teacher_load']:g}, {r['input_len']}+{r['output_len']}": _within(
            r["ratio"], *r["interval"]
        )
        for r in rows
    }


def _within(value: Any, low: Any, high: Any) -> Fact:
    numbers = (value, low, high)
    if not all(n is None or (isinstance(n, int | float)) for n in numbers):
        raise TypeError(f"{str(numbers)[:80]} are not numbers")
    return Fact(*numbers)


def _named(model: str, name: str) -> str:
    return f"{model}.{name}" if model else name


def exact(value: Any) -> Part:
    """A JSON value by dotted keys, what is empty as `{}` or `[]`."""
    return {key: Fact(leaf) for key, leaf in _leaves(value, "")}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, dict | list):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, inner in named:
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
        if not value and path:
            yield path, "{}" if isinstance(value, dict) else "[]"
    else:
        yield path, value


def _json(path: Path) -> dict[str, Any]:
    folder = inside(path.parent, path.name)
    if folder is None:
        raise _unknown(path, "nothing is here")
    return read_object(folder, code=Code.INPUT_CONFIG, max_bytes=_MAX_BYTES, max_nodes=_MAX_NODES)


def _unknown(place: Path, cause: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_MISSING,
            cause,
            where=str(place),
            fix=f"name a run's folder, an artifact, a checkpoint, or a {REPORT} or {PROFILE}",
        )
    )
