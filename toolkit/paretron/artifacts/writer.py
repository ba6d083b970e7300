"""Streaming safetensors shards: the layout is known first, so tensors are written as they come."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
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


class TensorWriter:
    """Writes the tensors of a layout, in its order, into one file or numbered shards.

    Memory held is one tensor; a shard's header is written before its first tensor.
    """

    def __init__(
        self, folder: Path, layout: Layout, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._layout = dict(layout)
        self._shards = _split(self._layout, max_shard_bytes)
        self._order = iter(self._layout)
        self._first_of = {names[0]: k for k, names in enumerate(self._shards)}
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            self._finish()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of the layout; its name, shape and dtype must be the planned."""
        import torch

        dtype, shape = self._layout[name]
        if next(self._order) != name or tuple(tensor.shape) != shape or dtype_name(tensor) != dtype:
            raise ValueError(f"{name}: {dtype_name(tensor)} {tuple(tensor.shape)} is not planned")
        if name in self._first_of:
            self._open_shard(self._first_of[name])
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)  # type: ignore[union-attr]

    def _open_shard(self, number: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self._shards[number]:
            dtype, shape = self._layout[name]
            end = position + prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        self._file = (self._folder / self._name(number)).open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _finish(self) -> None:
        left = next(self._order, None)
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
