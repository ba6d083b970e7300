"""Safetensors headers, believed only after every number in them has been checked."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from paretron.artifacts.jsonfile import MAX_JSON_BYTES, parse_object
from paretron.errors import Code, ParetronError, Problem

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` is the byte offset in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file, from its header alone.

    Errors: INPUT_LFS for a git-lfs pointer, INPUT_TRUNCATED when the file ends early,
    INPUT_HEADER for anything else that the format forbids (overlap, hole, trailing bytes,
    duplicate name, absurd length, unknown dtype).
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        if start.startswith(b"version "):
            raise ParetronError(
                Problem(
                    Code.INPUT_LFS,
                    "a git-lfs pointer, not weights",
                    where=str(file),
                    fix="run `git lfs pull` in the model's folder",
                )
            )
        if len(start) < 8:
            raise _truncated(file, size, 8)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_JSON_BYTES:
            raise _bad(file, f"the header claims {length} bytes")
        if 8 + length > size:
            raise _truncated(file, size, 8 + length)
        header = parse_object(f.read(length), where=str(file), code=Code.INPUT_HEADER)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, raw, 8 + length) for name, raw in header.items()}
    _check_layout(file, entries, data_start=8 + length, size=size)
    return entries


def _entry(file: Path, name: str, raw: object, data_start: int) -> TensorEntry:
    keys = len(raw) if isinstance(raw, dict) else 0
    match raw:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
        } if keys == 3:
            pass
        case _:
            raise _bad(file, "its entry is not {dtype, shape, data_offsets}", name)
    if dtype not in DTYPE_BYTES:
        raise _bad(file, f"dtype {dtype[:40]!r} is not one of {', '.join(DTYPE_BYTES)}", name)
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise _bad(file, f"shape {str(shape)[:80]} is not a list of sizes", name)
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != nbytes or begin < 0:
        raise _bad(file, f"offsets {begin}:{end} do not hold {nbytes} bytes", name)
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _check_layout(
    file: Path, entries: dict[str, TensorEntry], *, data_start: int, size: int
) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            kind = "a hole before it" if entry.start > position else "it overlaps another tensor"
            raise _bad(file, kind, entry.name)
        position += entry.nbytes
    if size < position:
        raise _truncated(file, size, position)
    if size > position:
        raise _bad(file, f"{size - position} bytes after the last tensor")


def _bad(file: Path, cause: str, tensor: str = "") -> ParetronError:
    where = f"{os.fspath(file)}: {tensor[:200]}" if tensor else str(file)
    return ParetronError(
        Problem(Code.INPUT_HEADER, cause, where=where, fix="download the file again")
    )


def _truncated(file: Path, size: int, needed: int) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_TRUNCATED,
            f"{size} bytes on disk, {needed} needed",
            where=str(file),
            fix="download the file again",
        )
    )
