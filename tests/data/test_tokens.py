from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from paretron.data import tokens
from paretron.data.store import HEADER, TokenStore, sample_windows
from paretron.data.tokens import build_token_store
from paretron.errors import Code, ParetronError, Problem
from pico import pico_tokenizer

TOKENIZER = pico_tokenizer()
EOS = 1
DOCUMENTS = ["the cat sat on the mat", "and the dog\nran", "x", "zoë über 日本\n" * 20]
EXPECTED = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
SEQUENCE = [token for ids in EXPECTED for token in [*ids, EOS]]


def build(folder: Path, **options: Any) -> TokenStore:
    return build_token_store(iter(DOCUMENTS), TOKENIZER, folder, eos_token_id=EOS, **options)


def everything(store: TokenStore) -> list[int]:
    return [int(store.window(i, 1)) for i in range(store.num_tokens)]


@pytest.mark.parametrize("shard_tokens", [1, 7, len(SEQUENCE), 1 << 28])
def test_documents_are_joined_by_the_end_of_text(tmp_path: Path, shard_tokens: int) -> None:
    store = build(tmp_path / "store", shard_tokens=shard_tokens)
    assert everything(store) == SEQUENCE
    starts = [int(s) for s in store.document_starts]
    assert [SEQUENCE[s - 1] for s in starts[1:]] == [EOS] * 3
    assert [SEQUENCE[s : s + len(ids)] for s, ids in zip(starts, EXPECTED, strict=True)] == EXPECTED
    for seq_len in (2, 5, 16):
        assert store.windows(seq_len) == len(SEQUENCE) // seq_len
        for i in range(store.windows(seq_len)):
            window = store.window(i, seq_len)
            assert window.dtype == torch.int64
            assert window.tolist() == SEQUENCE[i * seq_len : (i + 1) * seq_len]


@pytest.mark.parametrize("max_tokens", [1, 5, len(EXPECTED[0]) + 1, len(SEQUENCE), 10**6])
def test_a_bound_on_tokens_is_exact(tmp_path: Path, max_tokens: int) -> None:
    store = build(tmp_path / "store", max_tokens=max_tokens)
    assert everything(store) == SEQUENCE[:max_tokens]
    assert all(start < store.num_tokens for start in store.document_starts)


def test_reading_stops_at_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_BATCH_CHARS", 100)
    seen = 0

    def endless() -> Iterator[str]:
        nonlocal seen
        while True:
            seen += 1
            yield "the cat sat on the mat"

    store = build_token_store(
        endless(), TOKENIZER, tmp_path / "s", eos_token_id=EOS, max_tokens=1000
    )
    assert store.num_tokens == 1000
    # the last batch was wanted; nothing is read after it
    per_document = len(EXPECTED[0]) + 1
    assert seen <= 1000 // per_document + 1 + 100 // len(DOCUMENTS[0]) + 1


def test_a_long_document_cut_in_pieces_is_still_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_PIECE_CHARS", 25)
    store = build(tmp_path / "store")
    assert everything(store) == SEQUENCE
    assert len(store.document_starts) == len(DOCUMENTS)


@pytest.mark.parametrize(("eos", "name"), [(1, "uint16"), (65535, "uint16"), (65536, "uint32")])
def test_large_token_ids_fit(tmp_path: Path, eos: int, name: str) -> None:
    store = build_token_store(["x"], TOKENIZER, tmp_path / "store", eos_token_id=eos)
    assert int(store.window(store.num_tokens - 1, 1)) == eos
    assert json.loads((tmp_path / "store" / HEADER).read_text())["dtype"] == name


def test_a_build_that_failed_is_no_store(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield from DOCUMENTS
        raise ParetronError(Problem(Code.INPUT_CORPUS, "bad line"))

    folder = tmp_path / "store"
    build(folder)
    with pytest.raises(ParetronError, match="bad line"):
        build_token_store(documents(), TOKENIZER, folder, eos_token_id=EOS)
    with pytest.raises(ParetronError, match="not a complete token store"):
        TokenStore.open(folder)
    # and building again in its place leaves nothing of it behind
    build(folder, shard_tokens=7)
    build(folder)
    assert everything(TokenStore.open(folder)) == SEQUENCE
    assert len(list(folder.glob("*.bin"))) == 2


def test_no_document_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParetronError, match="no document"):
        build_token_store([], TOKENIZER, tmp_path / "store", eos_token_id=EOS)


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_file_that_is_no_header_is_named(tmp_path: Path, text: str) -> None:
    build(tmp_path / "store")
    (tmp_path / "store" / HEADER).write_text(text)
    with pytest.raises(ParetronError) as caught:
        TokenStore.open(tmp_path / "store")
    assert HEADER in caught.value.problems[0].where


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    build(tmp_path / "store")
    path = tmp_path / "store" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ParetronError) as caught:
        TokenStore.open(tmp_path / "store")
    assert caught.value.problems[0].where == str(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"}, {"num_tokens": -1}, {"num_tokens": "many"}, {"num_tokens": None},
        {"shard_tokens": 0}, {"shard_tokens": -5}, {"num_documents": 0}, {"eos_token_id": []},
    ],
)  # fmt: skip
def test_a_broken_header_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    build(tmp_path / "store")
    path = tmp_path / "store" / HEADER
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ParetronError) as caught:
        TokenStore.open(tmp_path / "store")
    assert HEADER in caught.value.problems[0].where


def test_a_text_shorter_than_one_window_says_both_numbers(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    with pytest.raises(ParetronError) as caught:
        store.windows(4096)
    problem = caught.value.problems[0]
    assert problem.code is Code.INPUT_CORPUS
    assert str(len(SEQUENCE)) in problem.cause
    assert "4096" in problem.cause


def test_a_window_outside_of_the_text_is_a_bug(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    for index in (-1, store.windows(4)):
        with pytest.raises(IndexError):
            store.window(index, 4)


def test_samples_differ_and_follow_the_seed(tmp_path: Path) -> None:
    store = build(tmp_path / "store")
    available = store.windows(4)
    a = sample_windows(store, 10, 4, seed=0)
    assert (a.shape, a.dtype) == ((10, 4), torch.int64)
    assert torch.equal(a, sample_windows(store, 10, 4, seed=0))
    assert not torch.equal(a, sample_windows(store, 10, 4, seed=1))
    every = sample_windows(store, available, 4, seed=0)
    there = sorted(store.window(i, 4).tolist() for i in range(available))
    assert sorted(every.tolist()) == there
    with pytest.raises(ParetronError) as caught:
        sample_windows(store, available + 1, 4, seed=0)
    assert f"at most {available} samples" in caught.value.problems[0].fix
