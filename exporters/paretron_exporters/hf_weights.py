"""A checkpoint's tensors into another one's files, each part read back and compared as it passes.

Comparing while a part is still in memory, and its copy in the page cache, proves every byte of the
files without reading either model a second time from the disk.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.rows import row_blocks
from paretron.artifacts.writer import TensorWriter
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import Check, largest_difference, weights_check
from paretron.families import expected_tensors
from paretron_exporters.exporter import OnEvent

if TYPE_CHECKING:
    import torch

_WAITING = 4  # parts that may wait to be compared
_ELSEWHERE = float("inf")  # the difference of a tensor that lies elsewhere than it was compared


def written_dtypes(checkpoint: Checkpoint, dtype: str | None) -> dict[str, str]:
    """The safetensors dtype that each tensor gets: its own, or the one asked for.

    UNSUPPORTED for a checkpoint in another dtype than float32, bfloat16 and float16.
    """
    if dtype is not None:
        wanted = next(k for k, v in DTYPE_NAMES.items() if v == dtype)
        return dict.fromkeys(checkpoint.entries, wanted)
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in DTYPE_NAMES:
            raise ParetronError(
                Problem(
                    Code.UNSUPPORTED,
                    f"dtype {entry.dtype}; supported: {', '.join(DTYPE_NAMES)}",
                    where=f"{entry.file}: {name}",
                    fix="state the export's dtype: float32, bfloat16 or float16",
                )
            )
    return {n: e.dtype for n, e in checkpoint.entries.items()}


def write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtypes: Mapping[str, str],
    shard_bytes: int,
    digests: dict[str, str],
    on_event: OnEvent,
) -> ReadBack:
    """Stream every tensor of the table, in its order, into safetensors shards, reading them back.

    `digests` gets the sha256 of every file. GATE_NONFINITE when a cast overflows.
    """
    names = expected_tensors(checkpoint.family, checkpoint.config)
    layout = {n: (dtypes[n], shape) for n, shape in names.items()}
    with (
        _reading_back() as proof,
        TensorWriter(folder, layout, max_shard_bytes=shard_bytes, digests=digests) as writer,
    ):
        for done, name in enumerate(names, start=1):
            written = 0
            for _, rows in row_blocks(checkpoint.entries[name]):
                part = cast(rows, dtypes[name], where=checkpoint.where(name))
                writer.write(name, part)
                file, start = writer.place(name)
                proof.expect(name, part, file=file, start=start, at=written)
                written += part.nbytes
            on_event("progress", {"done": done, "total": len(names), "unit": "tensors"})
    return proof


def cast(tensor: torch.Tensor, dtype: str, *, where: str) -> torch.Tensor:
    """A tensor in a safetensors dtype; GATE_NONFINITE naming `where` when it overflows."""
    import torch

    wanted = getattr(torch, DTYPE_NAMES[dtype])
    if tensor.dtype == wanted:
        return tensor
    out = tensor.to(wanted)
    if not torch.isfinite(out).all():
        raise ParetronError(
            Problem(
                Code.GATE_NONFINITE,
                f"{float(tensor.abs().max()):.3g} is too large for {DTYPE_NAMES[dtype]}",
                where=where,
                fix="export as bfloat16 or float32",
            )
        )
    return out


class ReadBack:
    """Parts of tensors read back from the file they were written to, on a thread of its own."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._waiting: deque[Future[None]] = deque()
        self._differences: dict[str, float] = {}
        self._places: dict[str, tuple[Path, int]] = {}

    def expect(self, name: str, part: torch.Tensor, *, file: Path, start: int, at: int) -> None:
        """`part` was just written `at` bytes behind the `start` of its tensor in `file`."""
        self._places[name] = (file, start)
        self._waiting.append(self._worker.submit(self._compare, name, part, file, start + at))
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait for what was not compared yet."""
        while self._waiting:
            self._waiting.popleft().result()

    def check(self, written: Checkpoint) -> Check:
        """L1: every tensor of the files, at the place its header says, is the one expected."""
        differences = dict(self._differences)
        for name, entry in written.entries.items():
            if self._places.get(name) != (entry.file, entry.start):
                differences[name] = _ELSEWHERE
        return weights_check(differences, bound=0.0)

    def _compare(self, name: str, part: torch.Tensor, file: Path, start: int) -> None:
        found = _read(file, start, like=part)
        before = self._differences.get(name, 0.0)
        self._differences[name] = max(before, largest_difference(part, found))


@contextmanager
def _reading_back() -> Iterator[ReadBack]:
    with ThreadPoolExecutor(1, "read-back") as worker:
        proof = ReadBack(worker)
        yield proof
        proof.finish()


def _read(file: Path, start: int, *, like: torch.Tensor) -> torch.Tensor:
    """The bytes at a place of a file as a tensor of the shape and dtype of `like`."""
    import torch

    out = torch.empty(like.shape, dtype=like.dtype)
    into = out.view(-1).view(torch.uint8).numpy().data
    with file.open("rb", buffering=0) as f:
        done = 0
        while done < len(into) and (got := os.preadv(f.fileno(), [into[done:]], start + done)):
            done += got
    if done < len(into):
        out = out.view(-1)[:0]  # a shorter file holds another tensor
    return out
