"""What the writer writes, the safetensors library reads, and the other way round."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from makers import PicoMaker
from paretron.artifacts.headers import read_header
from paretron.artifacts.reader import INDEX, SINGLE, Checkpoint
from paretron.artifacts.writer import TensorWriter, dtype_name

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.randn(shape) * 3).to(dtype)


def write(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 1 << 30) -> None:
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    with TensorWriter(folder, layout, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": random_tensor(dtype, (7, 5)),
        "transposed": random_tensor(dtype, (5, 7)).t(),
        "slice": random_tensor(dtype, (9, 5))[::2, 1:],
        "scalar": random_tensor(dtype, ()),
        "none": random_tensor(dtype, (0, 3)),
        "one": random_tensor(dtype, (1,)),
    }
    write(tmp_path, tensors)
    read = load_file(tmp_path / SINGLE)
    assert all(equal(read[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / SINGLE, "pt") as f:
        assert f.metadata() == {"format": "pt"}


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 6), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 400),
)
def test_any_layout_in_shards_of_any_size(
    specs: list[tuple[torch.dtype, list[int]]], max_shard_bytes: int
) -> None:
    tensors = {f"t{i}": random_tensor(d, tuple(s)) for i, (d, s) in enumerate(specs)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, tensors, max_shard_bytes)
        files = sorted(folder.glob("*.safetensors"))
        assert all(equal(t, tensors[n]) for f in files for n, t in load_file(f).items())
        headers = {f.name: read_header(f) for f in files}
        for entries in headers.values():
            assert sum(e.nbytes for e in entries.values()) <= max_shard_bytes or len(entries) == 1
            assert all(entries)
        if len(files) == 1:
            assert files[0].name == SINGLE
            assert not (folder / INDEX).exists()
            return
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {n: f for f, e in headers.items() for n in e}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        count = len(files)
        assert [f.name for f in files] == [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 200))
def test_rows_in_blocks_are_the_same_file_and_hashed_on_the_way(
    blocks: list[int], max_shard_bytes: int
) -> None:
    tensors = {"a": torch.randn(sum(blocks), 3), "b": torch.randn(2), "c": torch.randn(3, 2, 2)}
    layout = {n: (dtype_name(t), tuple(t.shape)) for n, t in tensors.items()}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        whole, cut = Path(name) / "whole", Path(name) / "cut"
        for folder in (whole, cut):
            folder.mkdir()
        write(whole, tensors, max_shard_bytes)
        with TensorWriter(cut, layout, max_shard_bytes=max_shard_bytes, digests=digests) as writer:
            for rows in tensors["a"].split(blocks):
                writer.write("a", rows)
            writer.write("b", tensors["b"])
            for row in tensors["c"].split(1):
                writer.write("c", row)
        files = {p.name: p.read_bytes() for p in whole.iterdir()}
        assert {p.name: p.read_bytes() for p in cut.iterdir()} == files
    weights = {n: b for n, b in files.items() if n.endswith(".safetensors")}
    assert digests == {n: hashlib.sha256(b).hexdigest() for n, b in weights.items()}


def test_equal_input_is_equal_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(10), "b": torch.ones(3, 3)}
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tensors)
    assert (tmp_path / "1" / SINGLE).read_bytes() == (tmp_path / "2" / SINGLE).read_bytes()


LAYOUT = {"a": ("F32", (2,)), "b": ("F32", (3,))}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", torch.zeros(3)),  # out of order
        ("a", torch.zeros(3)),  # another shape
        ("a", torch.zeros(2, dtype=torch.float64)),  # another dtype
    ],
)
def test_what_was_not_planned_is_refused(name: str, tensor: torch.Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not planned"),
        TensorWriter(tmp_path, LAYOUT) as writer,
    ):
        writer.write(name, tensor)


def test_rows_that_are_too_many_too_few_or_another_tensors(tmp_path: Path) -> None:
    layout = {"a": ("F32", (3, 2)), "b": ("F32", (3,))}
    for rows, then in ((2, "b"), (2, "a"), (4, "a")):
        with (
            pytest.raises(ValueError, match="not planned"),
            TensorWriter(tmp_path, layout) as writer,
        ):
            writer.write("a", torch.zeros(rows, 2))
            writer.write(then, torch.zeros(2, 2) if then == "a" else torch.zeros(3))
    with (
        pytest.raises(ValueError, match="a was planned"),
        TensorWriter(tmp_path, layout) as writer,
    ):
        writer.write("a", torch.zeros(2, 2))


def test_what_was_planned_must_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="b was planned"),
        TensorWriter(tmp_path, LAYOUT) as writer,
    ):
        writer.write("a", torch.zeros(2))


def test_reader_and_writer_are_inverse(pico: PicoMaker, tmp_path: Path) -> None:
    source = Checkpoint.open(pico("qwen3", dtype="bfloat16"))
    tensors = {n: source.read(n) for n in source.entries}
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", tensors, 20_000)
    (tmp_path / "out/config.json").write_bytes((source.path / "config.json").read_bytes())
    copy = Checkpoint.open(tmp_path / "out")
    assert all(equal(copy.read(n), t) for n, t in tensors.items())
    assert copy.nbytes == source.nbytes


def test_the_library_may_add_metadata(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE, metadata={"note": "x" * 1000})
    assert set(read_header(tmp_path / SINGLE)) == {"a"}
