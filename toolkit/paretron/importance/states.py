"""Hidden states that wait for their next layer: in memory, or in files where they do not fit."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch


class HiddenStates:
    """Hidden states by (slot, batch), in memory or, above `memory_bytes`, in files of `folder`.

    The files lie in a folder of their own, which is removed at the end.
    """

    def __init__(self, *, memory_bytes: int | None = None, folder: Path | None = None) -> None:
        self._left = sys.maxsize if memory_bytes is None else memory_bytes
        self._parent = folder
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self._files: dict[tuple[int, int], _Spilled] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.spilled_bytes = 0

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def __setitem__(self, key: tuple[int, int], hidden: torch.Tensor) -> None:
        """Keep a tensor under (slot, batch); what was there is forgotten."""
        self.forget(key)
        nbytes = hidden.numel() * hidden.itemsize
        if nbytes <= self._left:
            self._left -= nbytes
            self._memory[key] = hidden
            return
        self.spilled_bytes += nbytes
        self._files[key] = _Spilled.write(self._path(key), hidden)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        """What was kept under (slot, batch)."""
        kept = self._memory.get(key)
        return self._files[key].read() if kept is None else kept

    def forget(self, key: tuple[int, int]) -> None:
        """Drop what is kept under (slot, batch), if anything."""
        kept = self._memory.pop(key, None)
        if kept is not None:
            self._left += kept.numel() * kept.itemsize
        spilled = self._files.pop(key, None)
        if spilled is not None:
            spilled.path.unlink()

    def _path(self, key: tuple[int, int]) -> Path:
        if self._folder is None:
            if self._parent is not None:
                self._parent.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix="hidden-", dir=self._parent)
        return Path(self._folder.name) / f"{key[0]}-{key[1]}.bin"


@dataclass(frozen=True)
class _Spilled:
    """A tensor in a file of its own, read through a memory map."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def write(cls, path: Path, tensor: torch.Tensor) -> _Spilled:
        path.write_bytes(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return cls(path, tensor.shape, tensor.dtype, tensor.device)

    def read(self) -> torch.Tensor:
        flat = torch.from_file(
            str(self.path), shared=False, size=self.shape.numel(), dtype=self.dtype
        )
        return flat.view(self.shape).to(self.device)
