"""Text to a token store: documents are tokenised in batches and streamed to disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from paretron.artifacts.jsonfile import dump
from paretron.data.mixing import Mixture, Piece
from paretron.data.store import (
    DOCUMENT_DTYPE,
    DOCUMENTS,
    HEADER,
    TOKEN_DTYPES,
    IntType,
    TokenStore,
    shard_file,
)
from paretron.errors import Code, ParetronError, Problem

SHARD_TOKENS = 1 << 28  # at most 1 GiB a file
# One call of the tokenizer sees about this much text: enough to keep all cores busy.
_BATCH_CHARS = 1 << 21
# A longer document is tokenised piece by piece: a tokenizer needs many times a text's size.
_PIECE_CHARS = 1 << 20


def build_token_store(
    documents: Iterable[str] | Mixture,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    eos_token_id: int,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Tokenise documents into a new store at `folder`, each followed by `eos_token_id`.

    No other special token is added. Reading stops as soon as `max_tokens` are there. Memory is
    bounded by the longest document. INPUT_CORPUS when there is no document at all.
    """

    def encode(texts: Iterable[str]) -> Iterator[Piece]:
        return _encoded(texts, tokenizer, eos_token_id)

    pieces = documents.pieces(encode) if isinstance(documents, Mixture) else encode(documents)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / HEADER, *folder.glob("tokens-*.bin")):
        old.unlink(missing_ok=True)
    # ids may have holes, so the number of tokens does not bound them
    largest = max(eos_token_id, *tokenizer.get_vocab().values())
    name = "uint16" if largest < 1 << 16 else "uint32"
    shards = _Shards(folder, TOKEN_DTYPES[name], shard_tokens)
    with (folder / DOCUMENTS).open("wb") as starts, closing(shards):
        num_documents = 0
        for begins, _, ids in pieces:
            if begins:
                starts.write(np.array(shards.num_tokens, DOCUMENT_DTYPE).tobytes())
                num_documents += 1
            limit = None if max_tokens is None else max_tokens - shards.num_tokens
            shards.write(ids[:limit])
            if shards.num_tokens == max_tokens:
                break
    if not num_documents:
        raise ParetronError(
            Problem(Code.INPUT_CORPUS, "no document in the text", where=str(folder))
        )
    header = {
        "dtype": name,
        "eos_token_id": eos_token_id,
        "num_documents": num_documents,
        "num_tokens": shards.num_tokens,
        "shard_tokens": shard_tokens,
    }
    # A killed process never leaves half a header: the name appears with the whole file.
    unfinished = folder / f".{HEADER}"
    dump(unfinished, header)
    unfinished.rename(folder / HEADER)
    return TokenStore.open(folder)


class _Shards:
    """One growing sequence of tokens, cut into files of equal length."""

    def __init__(self, folder: Path, dtype: IntType, length: int) -> None:
        self.num_tokens = 0
        self._folder = folder
        self._dtype = dtype
        self._length = length
        self._file: BinaryIO | None = None

    def write(self, ids: list[int]) -> None:
        tokens = np.array(ids, dtype=self._dtype)
        while len(tokens):
            shard, offset = divmod(self.num_tokens, self._length)
            if offset == 0:
                self.close()
                self._file = (self._folder / shard_file(shard)).open("wb")
            assert self._file is not None  # opened with its first token
            part, tokens = np.split(tokens, [self._length - offset])
            self._file.write(part.tobytes())
            self.num_tokens += len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _encoded(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, eos_token_id: int
) -> Iterator[Piece]:
    """Token ids piece by piece, with whether a document begins and ends there."""
    for batch in _batches(documents):
        encoded = tokenizer(
            [text for text, _, _ in batch],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about a context that windows respect later
        )["input_ids"]
        for (_, begins, ends), ids in zip(batch, encoded, strict=True):
            yield begins, ends, [*ids, eos_token_id] if ends else ids


def _batches(documents: Iterable[str]) -> Iterator[list[tuple[str, bool, bool]]]:
    """Pieces (text, first of its document, last of its document), about `_BATCH_CHARS` a batch."""
    batch: list[tuple[str, bool, bool]] = []
    chars = 0
    for document in documents:
        pieces = list(_pieces(document))
        for number, piece in enumerate(pieces):
            batch.append((piece, number == 0, number == len(pieces) - 1))
            chars += len(piece)
            if chars >= _BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def _pieces(document: str) -> Iterator[str]:
    """Cut a long document after line breaks, where words (and so tokens) end anyway."""
    start = 0
    while len(document) - start > _PIECE_CHARS:
        end = document.rfind("\n", start, start + _PIECE_CHARS) + 1 or start + _PIECE_CHARS
        yield document[start:end]
        start = end
    yield document[start:]
