"""A tensor in blocks is the tensor; what is no number is found in any of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from paretron.artifacts.finite import count_nonfinite
from paretron.artifacts.headers import TensorEntry, read_header
from paretron.artifacts.passing import blocks_of
from paretron.artifacts.rows import row_blocks
from paretron.artifacts.writer import dtype_name
from paretron.errors import Code, ParetronError

FLOATS = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # fmt: skip


def stored(tensor: torch.Tensor, folder: Path) -> TensorEntry:
    save_file({"other": torch.ones(3), "t": tensor}, folder / "x.safetensors")
    return read_header(folder / "x.safetensors")["t"]


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (7, 5), (4, 3, 2)])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_blocks_are_the_rows_in_order(
    shape: tuple[int, ...], block_bytes: int, tmp_path: Path
) -> None:
    tensor = torch.randn(shape)
    blocks = list(row_blocks(stored(tensor, tmp_path), block_bytes=block_bytes))
    assert [first for first, _ in blocks] == [
        sum(len(b) for _, b in blocks[:k]) if shape else 0 for k in range(len(blocks))
    ]
    parts = [b for _, b in blocks]
    assert torch.equal(torch.cat(parts) if shape else parts[0], tensor)
    if tensor.dim() > 1 and tensor.numel():
        row_bytes = tensor[0].nbytes
        assert all(b.nbytes <= max(block_bytes, row_bytes) for b in parts)


def test_the_count_is_of_the_whole_tensor(tmp_path: Path) -> None:
    tensor = torch.zeros(9, 4)
    tensor[0, 1], tensor[8, 3], tensor[5] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(ParetronError) as caught:
        list(row_blocks(stored(tensor, tmp_path), block_bytes=16))
    (problem,) = caught.value.problems
    assert problem.code is Code.INPUT_NONFINITE
    assert problem.cause.startswith("6 of 36")
    assert problem.where.endswith("x.safetensors: t")


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    entry = stored(torch.zeros(9, 4), tmp_path)
    os.truncate(entry.file, entry.start + entry.nbytes - 1)
    with pytest.raises(ParetronError) as caught:
        list(row_blocks(entry, block_bytes=16))
    assert caught.value.problems[0].code is Code.INPUT_TRUNCATED


@given(st.sampled_from(FLOATS), st.binary(min_size=8, max_size=400))
def test_bits_that_are_no_numbers_are_counted(dtype: torch.dtype, raw: bytes) -> None:
    raw = raw[: len(raw) // 8 * 8]
    values = torch.frombuffer(bytearray(raw), dtype=dtype)
    wanted = int((~torch.isfinite(values.double())).sum())
    assert count_nonfinite(np.frombuffer(raw, np.uint8), dtype_name(values)) == wanted


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 23) + 3])
def test_a_file_passes_by_whole_and_stays_cached(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(size))
    assert b"".join(bytes(b) for b in blocks_of(path)) == path.read_bytes()
    with path.open("rb") as f:
        into = memoryview(bytearray(size))
        try:
            held = os.preadv(f.fileno(), [into], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system cannot tell what is cached")
        assert held == size  # just written, so it was in the page cache before


def test_a_range_of_a_file_and_one_past_its_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    for start, end, wanted in ((2, 7, [b"234", b"56"]), (6, 99, [b"678", b"9"]), (3, 3, [])):
        found = blocks_of(tmp_path / "x", start=start, end=end, block_bytes=3)
        assert [bytes(b) for b in found] == wanted


def test_what_was_not_cached_is_not_cached_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(3 << 20))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if any(_cached_bytes(fd, k << 20) for k in range(3)):
        pytest.skip("this file system keeps every file in memory")
    for _ in blocks_of(path, block_bytes=1 << 20):
        pass
    assert sum(_cached_bytes(fd, k << 20) for k in range(3)) <= 1  # a page may be busy
    os.close(fd)


def _cached_bytes(fd: int, position: int) -> int:
    try:
        return os.preadv(fd, [bytearray(1)], position, os.RWF_NOWAIT)
    except OSError:
        return 0
