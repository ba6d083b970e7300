"""Reading JSON that may be hostile: bounded, no duplicate keys, finite numbers only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from paretron.errors import Code, ParetronError, Problem

MAX_JSON_BYTES = 100_000_000  # the safetensors format's own bound for a header
_RESTORE = "restore the file from where it came"


def parse_object(text: bytes, *, where: str, code: Code) -> dict[str, Any]:
    """Parse one JSON object; `code` when it is malformed, repeats a key or is not an object."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ParetronError(
            Problem(code, f"not valid JSON: {str(error)[:200]}", where=where, fix=_RESTORE)
        ) from error
    if not isinstance(value, dict):
        raise ParetronError(
            Problem(code, f"a {type(value).__name__}, not a JSON object", where=where, fix=_RESTORE)
        )
    return value


def read_object(path: Path, *, code: Code) -> dict[str, Any]:
    """Read a JSON object from a file of at most 100 MB."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ParetronError(
            Problem(code, f"larger than {MAX_JSON_BYTES} bytes", where=str(path), fix=_RESTORE)
        )
    return parse_object(path.read_bytes(), where=str(path), code=code)


def dump(path: Path, value: object) -> None:
    """Write JSON the same way every time: sorted keys, two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return out


def _finite(text: str) -> float:
    """1e400 is a JSON number, but a float only knows it as infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
