"""manifest.json: what an artifact holds, where it came from, and how to tell that it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from paretron import __version__
from paretron.artifacts.guard import inside
from paretron.artifacts.jsonfile import dump, dumps, read_object
from paretron.artifacts.passing import blocks_of
from paretron.errors import Code, ParetronError, Problem, raise_all

MANIFEST = "manifest.json"
_CONTENT = ("*.json", "*.safetensors", "*.jinja", "*.model")  # of a downloaded checkpoint
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSIONED = ("torch", "transformers", "safetensors", "onnxruntime-genai", "onnxruntime")


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from; no time and no path of this machine, so equal work is equal.

    `parents` maps a role ("teacher") to the parent's manifest sha256, `unverified` names the roles
    of parents that no sum vouched for, `settings` is the recipe's part, `stage` what a run needs to
    know it again, `stamp` marks what must not be mistaken for the real thing (TEST).
    """

    kind: str
    parents: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stamp: str | None = None
    stage: Mapping[str, Any] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks_of(path):
        digest.update(block.data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide what is written."""
    found = {"paretron": __version__, "python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    folder: Path, provenance: Provenance, *, digests: Mapping[str, str] | None = None
) -> None:
    """Write manifest.json over every file in the folder; `digests` holds sha256 known already."""
    names = {
        str(p.relative_to(folder)): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / MANIFEST
    }
    known = digests or {}
    files = {
        name: {"sha256": known.get(name) or sha256_file(path), "bytes": path.stat().st_size}
        for name, path in names.items()
    }
    body: dict[str, Any] = {
        "schema": 1,
        "kind": provenance.kind,
        "files": files,
        "parents": dict(provenance.parents),
        "unverified": sorted(provenance.unverified),
        "settings": dict(provenance.settings),
        "seed": provenance.seed,
        "stamp": provenance.stamp,
        "stage": dict(provenance.stage),
        "versions": versions(),
    }
    dump(folder / MANIFEST, body | {"self_sha256": _self_sha256(body)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; INPUT_MANIFEST when it is absent or was edited."""
    path = inside(folder, MANIFEST)
    if path is None:
        fix = "name an artifact that Paretron wrote"
        if (folder / "config.json").is_file():
            fix = f"`paretron inspect {folder}` checks a checkpoint that somebody else wrote"
        raise ParetronError(
            Problem(
                Code.INPUT_MANIFEST,
                f"no {MANIFEST} here to compare with",
                where=str(folder),
                fix=fix,
            )
        )
    manifest = read_object(path, code=Code.INPUT_MANIFEST)
    body = {k: v for k, v in manifest.items() if k != "self_sha256"}
    whole = (
        manifest.get("self_sha256") == _self_sha256(body)
        and isinstance(manifest.get("files"), dict)
        and path.read_bytes() == dumps(manifest).encode()  # a space more is a change too
    )
    if not whole:
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
    """Compare every file with the manifest and return it; each difference is one problem.

    A link, a pipe, a device or an empty folder is a difference as well: nothing like that is ever
    written.
    """
    manifest = read_manifest(folder)
    listed: dict[str, Any] = manifest["files"]
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p != folder / MANIFEST}
    parents = {str(p) for name in listed for p in Path(name).parents}
    stray = {
        name for name, path in found.items()
        if name not in listed and (path.is_symlink() or not path.is_dir() or name not in parents)
    }  # fmt: skip
    problems = [
        Problem(Code.INPUT_MANIFEST, cause, where=str(folder / name), fix="make the artifact again")
        for name, cause in [
            *((name, "the manifest does not list it") for name in sorted(stray)),
            *(
                (name, "listed in the manifest, but not here")
                for name in sorted(set(listed) - set(found))
            ),
            *(
                (name, _difference(found[name], listed[name]))
                for name in sorted(set(listed) & set(found))
            ),
        ]
        if cause
    ]
    raise_all(problems)
    return manifest


def _difference(path: Path, entry: object) -> str:
    """How a file differs from its entry, or nothing."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        return "a link, not a file" if stat.S_ISLNK(mode) else "not a file"
    match entry:
        case {"sha256": str(sha256), "bytes": int(size)}:
            if path.stat().st_size == size and sha256_file(path) == sha256:
                return ""
    return "its bytes differ from the manifest"


@dataclass(frozen=True)
class Identity:
    """A stable name for a folder's content, and whether a sum from before vouches for it.

    Without one, nobody can tell these bytes from those that the model's makers meant.
    """

    sha256: str
    verified: bool


def identity(folder: Path) -> str:
    """A stable name for an artifact's content: its manifest's hash, or that of its files.

    A folder without a manifest (a downloaded checkpoint) is known by config and weight files.
    """
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["self_sha256"])
    return identify(folder).sha256


def identify(folder: Path) -> Identity:
    """The identity of an input, every byte read and compared with the sums that are known.

    An artifact is compared with its manifest, a file of a hub's cache with the sum that is its
    blob's name. INPUT_MANIFEST, INPUT_CHECKSUM when one differs.
    """
    if (folder / MANIFEST).is_file():
        return Identity(str(verify(folder)["self_sha256"]), verified=True)
    paths = [p for pattern in _CONTENT for p in sorted(folder.glob(pattern))]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(sha256_file, paths))
    digest = hashlib.sha256()
    verified = bool(paths)
    for path, found in zip(paths, sums, strict=True):
        digest.update(os.fsencode(path.name) + f" {found}\n".encode())
        known = _blob_sum(path)
        if known not in (None, found):
            raise ParetronError(
                Problem(
                    Code.INPUT_CHECKSUM,
                    f"its sha256 is {found[:16]}, but the hub's is {str(known)[:16]}",
                    where=str(path),
                    fix="remove the file that it links to from the cache and download it again",
                )
            )
        verified &= known is not None or path.suffix != ".safetensors"
    return Identity(digest.hexdigest(), verified)


def _blob_sum(path: Path) -> str | None:
    """The sha256 that a hub's cache knows of a file, by the name of the blob it links to."""
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def _self_sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
