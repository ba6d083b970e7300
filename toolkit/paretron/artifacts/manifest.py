"""manifest.json: what an artifact holds, where it came from, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from paretron import __version__
from paretron.artifacts.jsonfile import dump, read_object
from paretron.errors import Code, ParetronError, Problem, raise_all

MANIFEST = "manifest.json"
_VERSIONED = ("torch", "transformers", "safetensors", "onnxruntime-genai", "onnxruntime")


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from; no time and no path of this machine, so equal work is equal.

    `parents` maps a role ("teacher") to the parent's manifest sha256, `settings` is the recipe's
    part, `stage` what a run needs to know it again, `stamp` marks what must not be mistaken for
    the real thing (TEST).
    """

    kind: str
    parents: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stamp: str | None = None
    stage: Mapping[str, Any] = field(default_factory=dict)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide what is written."""
    found = {"paretron": __version__, "python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, provenance: Provenance) -> None:
    """Write manifest.json over every file in the folder."""
    files = {
        str(p.relative_to(folder)): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / MANIFEST
    }
    body: dict[str, Any] = {
        "schema": 1,
        "kind": provenance.kind,
        "files": files,
        "parents": dict(provenance.parents),
        "settings": dict(provenance.settings),
        "seed": provenance.seed,
        "stamp": provenance.stamp,
        "stage": dict(provenance.stage),
        "versions": versions(),
    }
    dump(folder / MANIFEST, body | {"self_sha256": _self_sha256(body)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; INPUT_MANIFEST when it is absent or was edited."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ParetronError(
            Problem(
                Code.INPUT_MANIFEST,
                "no manifest.json here",
                where=str(folder),
                fix="name an artifact that Paretron wrote",
            )
        )
    manifest = read_object(path, code=Code.INPUT_MANIFEST)
    body = {k: v for k, v in manifest.items() if k != "self_sha256"}
    if manifest.get("self_sha256") != _self_sha256(body) or not isinstance(
        manifest.get("files"), dict
    ):
        raise ParetronError(
            Problem(
                Code.INPUT_MANIFEST,
                "the manifest was changed after it was written",
                where=str(path),
                fix="make the artifact again",
            )
        )
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return it; each difference is one problem."""
    manifest = read_manifest(folder)
    listed: dict[str, Any] = manifest["files"]
    present = {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if (p.is_file() or p.is_symlink()) and p != folder / MANIFEST
    }
    problems = [
        Problem(Code.INPUT_MANIFEST, cause, where=str(folder / name), fix="make the artifact again")
        for name, cause in [
            *((n, "a file that the manifest does not list") for n in sorted(present - set(listed))),
            *((n, "listed in the manifest, but not here") for n in sorted(set(listed) - present)),
            *(
                (n, "its bytes differ from the manifest")
                for n in sorted(present & set(listed))
                if not _is_as_listed(folder / n, listed[n])
            ),
        ]
    ]
    raise_all(problems)
    return manifest


def _is_as_listed(path: Path, entry: object) -> bool:
    if not path.is_file():  # a link to nowhere
        return False
    match entry:
        case {"sha256": str(sha256), "bytes": int(size)}:
            return path.stat().st_size == size and sha256_file(path) == sha256
    return False


def identity(folder: Path) -> str:
    """A stable name for an artifact's content: its manifest's hash, or that of its weights.

    A folder without a manifest (a downloaded checkpoint) is known by config and weight files.
    """
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["self_sha256"])
    digest = hashlib.sha256()
    for pattern in ("*.json", "*.safetensors", "*.jinja", "*.model"):
        for path in sorted(folder.glob(pattern)):
            digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _self_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
