from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.artifacts.models import load_tokenizer
from paretron.data.sources import read_documents
from paretron.data.tokenizer import tokenizer_sha256, train_tokenizer
from paretron.errors import Code, ParetronError, Problem
from paretron.recipe import TextSource

VALIDATION = TextSource(corpus="stdlib", part="validation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_documents(VALIDATION), 1024, folder)
    return folder


def test_it_is_the_same_every_time(trained: Path, tmp_path: Path) -> None:
    train_tokenizer(read_documents(VALIDATION), 1024, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    assert tokenizer_sha256(tmp_path) == tokenizer_sha256(trained)


def test_it_loads_as_saved_beside_a_llama(trained: Path, tmp_path: Path) -> None:
    """AutoTokenizer looks at a neighbouring config too, and must not take another class for it."""
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = "def main(self):\n        return [x**2 for x in range(10)]  # naïve\n"
    ids = load_tokenizer(trained)(text)["input_ids"]
    assert load_tokenizer(tmp_path)(text)["input_ids"] == ids
    assert len(ids) < len(text) / 2
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 1024
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


@given(text=st.text())
def test_every_text_comes_back(trained: Path, text: str) -> None:
    tokenizer = load_tokenizer(trained)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_little_text_gives_a_small_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(["a little text"]), 4096, tmp_path)
    assert 259 <= len(tokenizer) < 300


def test_a_bad_document_is_not_hidden_by_the_training(tmp_path: Path) -> None:
    def documents() -> Iterator[str]:
        yield "fine"
        raise ParetronError(Problem(Code.INPUT_CORPUS, "bad line"))

    with pytest.raises(ParetronError, match="bad line"):
        train_tokenizer(documents(), 300, tmp_path)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParetronError) as caught:
        tokenizer_sha256(tmp_path)
    assert caught.value.problems[0].code is Code.INPUT_TOKENIZER
