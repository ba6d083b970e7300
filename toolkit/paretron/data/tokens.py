"""Text to a token store: documents are tokenised in batches and streamed to disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from paretron.artifacts.journal import Journal, Key
from paretron.artifacts.jsonfile import dump
from paretron.data.mixing import Mixture, Piece, Position, read_from
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
# So many tokens at most are made again by a process that goes on after one that was killed.
_SAVE_TOKENS = 1 << 22
_BEGUN: Key = ("begun",)


def build_token_store(
    documents: Iterable[str] | Mixture,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    eos_token_id: int,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    journal: Journal | None = None,
) -> TokenStore:
    """Tokenise documents into a new store at `folder`, each followed by `eos_token_id`.

    No other special token is added. Reading stops as soon as `max_tokens` are there. Memory is
    bounded by the longest document. With a `journal` of the same documents and settings a store
    that was not finished is gone on with: what it holds is not tokenised again. INPUT_CORPUS when
    there is no document at all.
    """

    def encode(texts: Iterable[str]) -> Iterator[Piece]:
        return _encoded(texts, tokenizer, eos_token_id)

    # ids may have holes, so the number of tokens does not bound them
    largest = max(eos_token_id, *tokenizer.get_vocab().values())
    name = "uint16" if largest < 1 << 16 else "uint32"
    begun = _begun(journal, folder, TOKEN_DTYPES[name], shard_tokens)
    if begun.whole:
        return TokenStore.open(folder)
    if isinstance(documents, Mixture):
        positions = begun.positions or [Position() for _ in documents.shares]
        pieces = documents.pieces(encode, positions)
    else:
        positions = begun.positions or [Position()]
        pieces = read_from(documents, encode, positions[0])
    written = _Written(folder, TOKEN_DTYPES[name], shard_tokens, begun)
    with closing(written):
        saved = written.num_tokens
        for begins, ends, ids in pieces:
            limit = None if max_tokens is None else max_tokens - written.num_tokens
            written.write(ids[:limit], begins=begins)
            if written.num_tokens == max_tokens:
                break
            if journal is not None and ends and written.num_tokens - saved >= _SAVE_TOKENS:
                saved = written.num_tokens
                written.sync()
                journal.add(_BEGUN, _Begun.of(written, positions).as_json())
    if not written.num_documents:
        raise ParetronError(
            Problem(Code.INPUT_CORPUS, "no document in the text", where=str(folder))
        )
    header = {
        "dtype": name,
        "eos_token_id": eos_token_id,
        "num_documents": written.num_documents,
        "num_tokens": written.num_tokens,
        "shard_tokens": shard_tokens,
    }
    # A killed process never leaves half a header: the name appears with the whole file.
    unfinished = folder / f".{HEADER}"
    dump(unfinished, header)
    unfinished.rename(folder / HEADER)
    if journal is not None:
        journal.add(_BEGUN, replace(_Begun.of(written, positions), whole=True).as_json())
    return TokenStore.open(folder)


@dataclass(frozen=True)
class _Begun:
    """What of a store is safely on disk, and how far its texts were read for it."""

    num_tokens: int = 0
    num_documents: int = 0
    positions: tuple[Position, ...] = ()
    whole: bool = False

    @classmethod
    def of(cls, written: _Written, positions: Sequence[Position]) -> _Begun:
        return cls(written.num_tokens, written.num_documents, tuple(positions))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> _Begun:
        positions = tuple(Position(**position) for position in value["positions"])
        return cls(**{**value, "positions": positions})


def _begun(journal: Journal | None, folder: Path, dtype: IntType, length: int) -> _Begun:
    """Where a store's making goes on; all files are dropped where its journal does not fit them."""
    found = _Begun()
    if journal is not None and _BEGUN in journal.known:
        found = _Begun.from_json(journal.known[_BEGUN])
    shard, offset = divmod(found.num_tokens, length)
    sizes = {shard_file(k): length * dtype.itemsize for k in range(shard)}
    sizes |= {shard_file(shard): offset * dtype.itemsize} if offset else {}
    sizes[DOCUMENTS] = found.num_documents * DOCUMENT_DTYPE.itemsize
    fits = all(_size(folder / name) >= size for name, size in sizes.items())
    if found.whole and fits and (folder / HEADER).is_file():
        return found
    if not fits or found.whole:
        found, sizes = _Begun(), {}
    folder.mkdir(parents=True, exist_ok=True)
    # Removed, not emptied: what was published of them has a second name.
    for old in (folder / HEADER, folder / DOCUMENTS, *folder.glob("tokens-*.bin")):
        if not sizes.get(old.name):
            old.unlink(missing_ok=True)
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


class _Written:
    """A store's growing files: where documents begin, and tokens, cut into files of one length."""

    def __init__(self, folder: Path, dtype: IntType, length: int, begun: _Begun) -> None:
        self.num_tokens, self.num_documents = begun.num_tokens, begun.num_documents
        self._folder = folder
        self._dtype = dtype
        self._length = length
        self._starts = _cut_at(folder / DOCUMENTS, self.num_documents * DOCUMENT_DTYPE.itemsize)
        self._file: BinaryIO | None = None
        shard, offset = divmod(self.num_tokens, length)
        if offset:
            self._file = _cut_at(folder / shard_file(shard), offset * dtype.itemsize)

    def write(self, ids: list[int], *, begins: bool) -> None:
        """Append tokens; `begins` where they are a document's first."""
        if begins:
            self._starts.write(np.array(self.num_tokens, DOCUMENT_DTYPE).tobytes())
            self.num_documents += 1
        tokens = np.array(ids, dtype=self._dtype)
        while len(tokens):
            shard, offset = divmod(self.num_tokens, self._length)
            if offset == 0:
                self._close_shard()
                self._file = _cut_at(self._folder / shard_file(shard), 0)
            assert self._file is not None  # opened with its first token
            part, tokens = np.split(tokens, [self._length - offset])
            self._file.write(part.tobytes())
            self.num_tokens += len(part)

    def sync(self) -> None:
        """Bring to disk what was written."""
        for file in filter(None, (self._starts, self._file)):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._starts.close()
        self._close_shard()

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _cut_at(path: Path, size: int) -> BinaryIO:
    """A file opened to go on after its first `size` bytes; what came after them is cut off."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


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
