"""One tensor of a file in memory, and whether all of its values are numbers."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from paretron.artifacts.headers import TensorEntry
from paretron.errors import Code, ParetronError, Problem

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 19  # what the check looks at twice: it stays in the processor's cache


def map_entry(entry: TensorEntry) -> torch.Tensor:
    """The tensor, memory-mapped and private: pages are read when touched, the file never changes.

    Its values are not checked: `check_finite` does that for what is used.
    """
    import torch

    dtype = torch_dtype(entry.dtype)
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype)
    page = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as f:
        # A private mapping: torch wants writable memory, the file must never change.
        memory = mmap.mmap(
            f.fileno(), entry.start - page + entry.nbytes, offset=page, access=mmap.ACCESS_COPY
        )
    flat = torch.frombuffer(
        memory, dtype=dtype, count=entry.nbytes // dtype.itemsize, offset=entry.start - page
    )
    return flat.view(entry.shape)


def check_finite(tensor: torch.Tensor, where: str) -> None:
    """INPUT_NONFINITE with the number of values that are NaN or infinite, naming `where`.

    Reads each byte once, at memory speed for a contiguous tensor on the CPU (another is copied
    first), so that checking a slice that is about to be written costs next to nothing.
    """
    import torch

    from paretron.artifacts.finite import count_nonfinite
    from paretron.artifacts.writer import dtype_name

    raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    name = dtype_name(tensor)
    steps = range(0, raw.size, _CHUNK_BYTES)
    count = sum(count_nonfinite(raw[start : start + _CHUNK_BYTES], name) for start in steps)
    if count:
        raise ParetronError(
            Problem(
                Code.INPUT_NONFINITE,
                f"{count} of {tensor.numel()} values are NaN or infinite",
                where=where,
                fix="use a checkpoint whose training did not diverge",
            )
        )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name, e.g. "BF16"."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]  # fmt: skip
