"""Hashes of files from outside, known again by sizes and times: large inputs are read once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Identity, identify

_VERIFIED, _UNVERIFIED = "verified", "unverified"
_QUICKLY_READ_BYTES = 256 << 20


def cache_root() -> Path:
    """What is kept between runs lies here: PARETRON_CACHE or the user's cache."""
    named = os.environ.get("PARETRON_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paretron"


def remembered(memory: Path, name: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """A hash over files, computed again only when a file's size or one of its times has changed.

    `memory` is the JSON file that holds the hashes by `name`.
    """
    stats = [(p, p.stat()) for p in files]
    seen = [[str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for p, s in stats]
    try:
        known: Any = json.loads(memory.read_text())
    except (OSError, ValueError):  # it is only a memory
        known = {}
    known = known if isinstance(known, dict) else {}
    entry = known.get(name)
    if not isinstance(entry, dict) or entry.get("seen") != seen or "hash" not in entry:
        entry = known[name] = {"seen": seen, "hash": compute()}
        _keep(memory, known)
    return str(entry["hash"])


def remembered_identity(memory: Path, folder: Path) -> Identity:
    """A folder's identity, every byte read and compared with the sums that are known of it, once.

    Errors: those of `identify`.
    """

    def read() -> str:
        found = identify(folder)
        return f"{found.sha256} {_VERIFIED if found.verified else _UNVERIFIED}"

    sha256, _, word = remembered(memory, str(folder), _files(folder), read).partition(" ")
    return Identity(sha256, verified=word == _VERIFIED)


def input_identity(folder: Path) -> Identity:
    """The identity of a verb's input; a large one's is remembered in the user's cache.

    Errors: those of `identify`.
    """
    folder = folder.resolve()
    if sum(p.stat().st_size for p in _files(folder)) < _QUICKLY_READ_BYTES:
        return identify(folder)
    return remembered_identity(cache_root() / "inputs.json", folder)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _keep(memory: Path, known: dict[str, Any]) -> None:
    half = memory.with_name(f".{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        dump(half, known)
        os.replace(half, memory)
    except OSError:  # a cache that cannot be written costs time alone
        with suppress(OSError):
            half.unlink()
