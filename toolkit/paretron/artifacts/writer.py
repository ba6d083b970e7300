"""Streaming safetensors shards: the layout is known first, so tensors are written as they come."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from paretron.artifacts.headers import DTYPE_BYTES
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.reader import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (safetensors dtype, shape)
DEFAULT_SHARD_BYTES = 5_000_000_000
_AHEAD = 4  # parts that may wait for the hash


class TensorWriter:
    """Writes the tensors of a layout, in its order, into one file or numbered shards.

    Tensors come whole or as blocks of rows; memory held is a few of them. A shard's header is
    written before its first tensor. With `digests` every file is hashed on its way, and its sha256
    is there under its name when it is complete; what was written must not be changed meanwhile.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        digests: dict[str, str] | None = None,
    ) -> None:
        self._folder = folder
        self._layout = dict(layout)
        self._shards = _split(self._layout, max_shard_bytes)
        self._order = iter(self._layout)
        self._first_of = {names[0]: k for k, names in enumerate(self._shards)}
        self._file: _File | None = None
        self._starts: dict[str, int] = {}  # of the open shard's tensors, in its file
        self._current, self._missing_bytes = "", 0
        self._digests = digests
        self._hasher = ThreadPoolExecutor(1, "sha256") if digests is not None else None

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close_shard()
        finally:
            if self._hasher is not None:
                self._hasher.shutdown()
        if kind is None:
            self._finish()

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Append the next tensor of the layout, or its next rows; ValueError if not planned so."""
        dtype, shape = self._layout[name]
        if not self._missing_bytes:
            self._start(name, next(self._order, ""))
        of_the_shape = rows.dim() == len(shape) and tuple(rows.shape[1:]) == shape[1:]
        fits = of_the_shape and rows.nbytes <= self._missing_bytes
        if name != self._current or dtype_name(rows) != dtype or not fits:
            raise ValueError(f"{name}: {dtype_name(rows)} {tuple(rows.shape)} is not planned")
        if rows.nbytes:
            self._missing_bytes -= rows.nbytes
            self._put(rows)

    def place(self, name: str) -> tuple[Path, int]:
        """The file of a tensor of the shard being written, and where in it the tensor starts.

        What was written of it until now can be read back there.
        """
        assert self._file is not None  # a shard is open once its first tensor is
        self._file.flush()
        return self._file.path, self._starts[name]

    def _start(self, name: str, expected: str) -> None:
        self._current = expected
        if name == expected:
            dtype, shape = self._layout[name]
            self._missing_bytes = prod(shape) * DTYPE_BYTES[dtype]
            if name in self._first_of:
                self._open_shard(self._first_of[name])

    def _put(self, rows: torch.Tensor) -> None:
        import torch

        assert self._file is not None  # a shard is open while a tensor is
        flat = rows.detach().cpu().contiguous().view(-1)
        self._file.put(flat.view(torch.uint8).numpy().data)

    def _open_shard(self, number: int) -> None:
        self._close_shard()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position, starts = 0, {}
        for name in self._shards[number]:
            dtype, shape = self._layout[name]
            starts[name] = position
            end = position + prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self._starts = {name: 8 + len(text) + start for name, start in starts.items()}
        self._file = _File(self._folder / self._name(number), self._hasher)
        self._file.put(memoryview(struct.pack("<Q", len(text)) + text))

    def _close_shard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            digest = file.close()
            if self._digests is not None:
                self._digests[file.path.name] = digest

    def _finish(self) -> None:
        left = self._current if self._missing_bytes else next(self._order, None)
        if left is not None:
            raise ValueError(f"{left} was planned but never written")
        if len(self._shards) == 1:
            return
        weight_map = {n: self._name(k) for k, names in enumerate(self._shards) for n in names}
        total = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in self._layout.values())
        dump(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class _File:
    """One shard being written, and hashed on another thread where there is one."""

    def __init__(self, path: Path, hasher: ThreadPoolExecutor | None) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hasher = hasher
        self._digest = hashlib.sha256()
        self._waiting: deque[Future[None]] = deque()

    def put(self, data: memoryview) -> None:
        self._file.write(data)
        if self._hasher is not None:
            self._waiting.append(self._hasher.submit(self._digest.update, data))
            while len(self._waiting) > _AHEAD:
                self._waiting.popleft().result()
        # Writing starts now rather than when memory runs short, and pages that are on the disk
        # are free for the next: a cache full of what nobody reads would only slow this down.
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Hand what was put to the system, for whoever opens the file."""
        self._file.flush()

    def close(self) -> str:
        """Close the file and return its sha256, "" where nothing was hashed."""
        self._file.close()
        for update in self._waiting:
            update.result()
        return self._digest.hexdigest() if self._hasher is not None else ""


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of a tensor's dtype, e.g. "BF16"."""
    import torch

    return {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL",
    }[tensor.dtype]  # fmt: skip


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in layout.items():
        nbytes = prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards
