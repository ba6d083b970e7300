"""Safetensors headers, believed only after every number in them has been checked."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from paretron.artifacts.guard import lfs_pointer, regular_size
from paretron.artifacts.jsonfile import MAX_JSON_BYTES, parse_object
from paretron.errors import Code, ParetronError, Problem

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_LARGEST = 1 << 40  # of a dimension
_MAX_RANK = 8


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

    Errors: INPUT_FILE for a pipe or the like, INPUT_LFS for a git-lfs pointer, INPUT_TRUNCATED
    when the file ends early, and a HEADER_ code for each other thing that the format forbids.
    """
    size = regular_size(file)
    with file.open("rb") as f:
        start = f.read(8)
        if start.startswith(b"version "):
            raise lfs_pointer(file, instead_of="weights")
        if len(start) < 8:
            raise _truncated(file, size, 8)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_JSON_BYTES:
            raise _bad(file, Code.HEADER_LENGTH, f"the header claims {length} bytes")
        if 8 + length > size:
            raise _truncated(file, size, 8 + length)
        header = parse_object(
            f.read(length),
            where=str(file),
            code=Code.HEADER_JSON,
            duplicate=Code.HEADER_DUPLICATE,
        )
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
            cause = "its entry is not {dtype, shape, data_offsets}"
            raise _bad(file, Code.HEADER_ENTRY, cause, name)
    if dtype not in DTYPE_BYTES:
        cause = f"dtype {dtype[:40]!r} is not one of {', '.join(DTYPE_BYTES)}"
        raise _bad(file, Code.HEADER_DTYPE, cause, name)
    if len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n < _LARGEST for n in shape):
        cause = f"shape {str(shape[: _MAX_RANK + 1])[:80]} is not a list of sizes"
        raise _bad(file, Code.HEADER_SHAPE, cause, name)
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if type(begin) is bool or type(end) is bool or end - begin != nbytes or begin < 0:
        cause = f"offsets {_short(begin)}:{_short(end)} do not hold {_short(nbytes)} bytes"
        raise _bad(file, Code.HEADER_OFFSETS, cause, name)
    return TensorEntry(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def _check_layout(
    file: Path, entries: dict[str, TensorEntry], *, data_start: int, size: int
) -> None:
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start > position:
            raise _bad(file, Code.HEADER_HOLE, "a hole before it", entry.name)
        if entry.start < position:
            raise _bad(file, Code.HEADER_OVERLAP, "it overlaps another tensor", entry.name)
        position += entry.nbytes
    if size < position:
        raise _truncated(file, size, position)
    if size > position:
        cause = f"{size - position} bytes after the last tensor"
        raise _bad(file, Code.HEADER_TRAILING, cause)


def _short(number: int) -> str:
    """A number as it stands, unless it is one that nobody can read."""
    return str(number) if abs(number) < 1 << 64 else "a number beyond 64 bits"


def _bad(file: Path, code: Code, cause: str, tensor: str = "") -> ParetronError:
    where = f"{os.fspath(file)}: {tensor[:200]}" if tensor else str(file)
    return ParetronError(Problem(code, cause, where=where, fix="download the file again"))


def _truncated(file: Path, size: int, needed: int) -> ParetronError:
    return ParetronError(
        Problem(
            Code.INPUT_TRUNCATED,
            f"{size} bytes on disk, {needed} needed",
            where=str(file),
            fix="download the file again",
        )
    )
