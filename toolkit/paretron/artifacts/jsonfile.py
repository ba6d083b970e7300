"""Reading JSON that may be hostile: bounded, no duplicate keys, finite numbers only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from paretron.artifacts.guard import LFS_START, lfs_pointer, regular_size
from paretron.errors import Code, ParetronError, Problem

# A header of 100 thousand tensors takes 15 MB. What JSON becomes in memory grows with its objects
# and lists, so they are counted before any is built.
MAX_JSON_BYTES = 20_000_000
MAX_JSON_NODES = 500_000
_RESTORE = "restore the file from where it came"


class _DuplicateKeyError(ValueError):
    pass


def parse_object(
    text: bytes,
    *,
    where: str,
    code: Code,
    duplicate: Code | None = None,
    max_nodes: int = MAX_JSON_NODES,
) -> dict[str, Any]:
    """Parse one JSON object; `code` when it is malformed, too large or no object.

    A key that stands twice, at any level, is `duplicate` where that is another code.
    """
    nodes = text.count(b"{") + text.count(b"[")
    if nodes > max_nodes:
        raise _refused(
            code, f"{len(text)} bytes with {nodes} objects and lists: too large to be true", where
        )
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except _DuplicateKeyError as error:
        raise _refused(duplicate or code, str(error), where) from error
    except (ValueError, RecursionError) as error:
        raise _refused(code, f"not valid JSON: {str(error)[:200]}", where) from error
    if not isinstance(value, dict):
        raise _refused(code, f"a {type(value).__name__}, not a JSON object", where)
    return value


def read_object(
    path: Path, *, code: Code, max_bytes: int = MAX_JSON_BYTES, max_nodes: int = MAX_JSON_NODES
) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 20 MB, unless more is allowed.

    INPUT_LFS for a git-lfs pointer, `code` for anything else that is wrong.
    """
    size = regular_size(path)
    if size > max_bytes:
        raise _refused(code, f"{size} bytes, larger than {max_bytes}", str(path))
    text = path.read_bytes()
    if text.startswith(LFS_START):
        raise lfs_pointer(path, instead_of="JSON")
    return parse_object(text, where=str(path), code=code, max_nodes=max_nodes)


def dumps(value: object) -> str:
    """JSON the same way every time: sorted keys, two spaces, a final newline."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def dump(path: Path, value: object) -> None:
    """Write JSON the same way every time."""
    path.write_text(dumps(value), "utf-8")


def _refused(code: Code, cause: str, where: str) -> ParetronError:
    return ParetronError(Problem(code, cause, where=where, fix=_RESTORE))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(f"the key {twice[:80]!r} stands twice")
    return out


def _finite(text: str) -> float:
    """1e400 is a JSON number, but a float only knows it as infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
