"""Safetensors headers: one negative test a rule of the format, and any bytes at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from paretron.artifacts.headers import DTYPE_BYTES, read_header
from paretron.errors import Code, ParetronError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def raw(header: object, data: bytes = b"\0" * 32, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return GOOD | {name: GOOD[name] | entry}


def error_of(tmp_path: Path, content: bytes) -> ParetronError:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ParetronError) as caught:
        read_header(file)
    assert "model.safetensors" in caught.value.problems[0].where
    return caught.value


def test_a_good_header(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw(GOOD | {"__metadata__": {"format": "pt"}}))
    found = read_header(file)
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in found.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
    }
    assert found["b"].start == found["a"].start + 24


TRUNCATED = Code.INPUT_TRUNCATED
RULES: dict[str, tuple[bytes, Code, str]] = {
    "empty file": (b"", TRUNCATED, "0 bytes"),
    "seven bytes": (b"\1" * 7, TRUNCATED, "8 needed"),
    "header longer than file": (raw(GOOD, b"", length=10_000), TRUNCATED, "needed"),
    "data cut by one byte": (raw(GOOD)[:-1], TRUNCATED, "needed"),
    "data cut by half": (raw(GOOD, b"\0" * 16), TRUNCATED, "needed"),
    "length 2**63": (raw(GOOD, length=2**63), Code.HEADER_LENGTH, "claims"),
    "length 2**64-1": (raw(GOOD, length=2**64 - 1), Code.HEADER_LENGTH, "claims"),
    "not JSON": (raw(b"{]"), Code.HEADER_JSON, "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), Code.HEADER_JSON, "not valid JSON"),
    "not an object": (raw([1]), Code.HEADER_JSON, "not a JSON object"),
    "nested too deep": (raw(b"[" * 100_000), Code.HEADER_JSON, "not valid JSON"),
    "a number of 5000 digits": (
        raw(b'{"a": ' + b"9" * 5000 + b"}"), Code.HEADER_JSON, "not valid JSON",
    ),
    "duplicate name": (raw(b'{"a": 1, "a": 2}'), Code.HEADER_DUPLICATE, "twice"),
    "duplicate key in an entry": (
        raw(b'{"a": {"dtype": "F32", "dtype": "U8"}}'), Code.HEADER_DUPLICATE, "twice",
    ),
    "half a million lists": (raw(b"[" * 600_000), Code.HEADER_JSON, "too large"),
    "nine dimensions": (raw(changed("a", shape=[1] * 9)), Code.HEADER_SHAPE, "not a list"),
    "a product beyond 64 bits": (
        raw(changed("a", shape=[2**39] * 8)), Code.HEADER_OFFSETS, "beyond 64 bits",
    ),
    "offsets that wrap around": (
        raw(changed("a", data_offsets=[2**64, 2**64 + 24])), Code.HEADER_HOLE, "hole",
    ),
    "boolean offsets": (raw(changed("a", data_offsets=[False, True])), Code.HEADER_OFFSETS, "hold"),
    "entry is no object": (raw({"a": 1}), Code.HEADER_ENTRY, "its entry is not"),
    "entry has another key": (raw(changed("a", extra=1)), Code.HEADER_ENTRY, "its entry is not"),
    "offsets are strings": (
        raw(changed("a", data_offsets=["0", "24"])), Code.HEADER_ENTRY, "its entry",
    ),
    "three offsets": (raw(changed("a", data_offsets=[0, 24, 24])), Code.HEADER_ENTRY, "its entry"),
    "unknown dtype": (raw(changed("a", dtype="F33")), Code.HEADER_DTYPE, "dtype 'F33'"),
    "negative size": (raw(changed("a", shape=[-2, -3])), Code.HEADER_SHAPE, "not a list of sizes"),
    "fractional size": (
        raw(changed("a", shape=[2.0, 3])), Code.HEADER_SHAPE, "not a list of sizes",
    ),
    "huge size": (raw(changed("a", shape=[2**41])), Code.HEADER_SHAPE, "not a list of sizes"),
    "boolean size": (raw(changed("a", shape=[True, 6])), Code.HEADER_SHAPE, "not a list of sizes"),
    "offsets against shape": (
        raw(changed("a", data_offsets=[0, 20])), Code.HEADER_OFFSETS, "do not hold 24",
    ),
    "negative offsets": (
        raw(changed("a", data_offsets=[-24, 0])), Code.HEADER_OFFSETS, "do not hold",
    ),
    "overlap": (raw(changed("b", data_offsets=[20, 28])), Code.HEADER_OVERLAP, "overlaps"),
    "hole": (raw(changed("b", data_offsets=[28, 36]), b"\0" * 36), Code.HEADER_HOLE, "hole"),
    "trailing bytes": (raw(GOOD, b"\0" * 33), Code.HEADER_TRAILING, "1 bytes after"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        Code.INPUT_LFS,
        "git-lfs pointer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named(rule: str, tmp_path: Path) -> None:
    content, code, says = RULES[rule]
    error = error_of(tmp_path, content)
    assert error.problems[0].code is code
    assert says in error.problems[0].cause
    assert error.exit_code == 3


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_our_words(content: bytes) -> None:
    _never_another_error(content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F3"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-8, 40), min_size=2, max_size=2) | JSON,
    }
)


@given(
    st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=3),
    st.binary(max_size=40),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_accepted_or_refused_in_our_words(
    header: dict[str, Any], data: bytes, length: int | None
) -> None:
    _never_another_error(raw(header, data, length=length))


@given(st.data())
def test_one_changed_byte_never_moves_a_tensor_out_of_its_file(data: st.DataObject) -> None:
    content = bytearray(raw(GOOD))
    position = data.draw(st.integers(0, len(content) - 33))  # in the length or the header
    content[position] = data.draw(st.integers(0, 255))
    _never_another_error(bytes(content))


def _never_another_error(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as f:
        f.write(content)
        f.flush()
        try:
            found = read_header(Path(f.name))
        except ParetronError as error:
            assert error.exit_code == 3
            return
        assert all(0 <= e.start <= e.start + e.nbytes <= len(content) for e in found.values())
        assert sum(e.nbytes for e in found.values()) <= len(content)


@pytest.mark.parametrize("make", [torch.zeros, torch.empty], ids=["zeros", "empty"])
def test_what_the_library_writes_is_read(make: Callable[..., Any], tmp_path: Path) -> None:
    tensors = {
        "scalar": make(()),
        "none": make((0, 4)),
        "bytes": make((3,), dtype=torch.uint8),
        "half": make((5, 2), dtype=torch.bfloat16),
        "flag": make((1,), dtype=torch.bool),
        "eight": make((7,), dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert {n: e.shape for n, e in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


def test_every_kind_of_fault_has_a_code_of_its_own() -> None:
    found = {code for _, code, _ in RULES.values()}
    assert found == {c for c in Code if c.name.startswith("HEADER_")} | {TRUNCATED, Code.INPUT_LFS}


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    name = "a\x1b[2J\n\ud800error: all is well"
    (problem,) = error_of(tmp_path, raw({name: 1})).problems
    assert problem.where.isprintable()
    assert r"a\x1b[2J\n\ud800error" in problem.where
