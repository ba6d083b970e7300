"""Tokens on disk, read through memory maps: windows of any length, and where documents begin.

A folder with `tokens-00000.bin`, ... (little-endian uint16 or uint32, one sequence cut into
shards), `documents.bin` (uint64, each document's first token) and `tokens.json`, which is written
last: without it the folder is not a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretron.artifacts.jsonfile import read_object
from paretron.data.order import window_id
from paretron.errors import Code, ParetronError, Problem

HEADER = "tokens.json"
DOCUMENTS = "documents.bin"
IntType = np.dtype[np.unsignedinteger[Any]]
IntArray = np.ndarray[tuple[int], IntType]
DOCUMENT_DTYPE: IntType = np.dtype("<u8")
TOKEN_DTYPES: dict[str, IntType] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def shard_file(index: int) -> str:
    """The name of a shard's file."""
    return f"tokens-{index:05d}.bin"


@dataclass(frozen=True, eq=False)
class TokenStore:
    """One long sequence of tokens: documents, each followed by the end-of-text token."""

    folder: Path
    num_tokens: int
    eos_token_id: int
    document_starts: IntArray
    _shards: tuple[IntArray, ...]
    _shard_tokens: int

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map a complete store; INPUT_CORPUS when the folder holds none or sizes do not fit."""
        if not (folder / HEADER).is_file():
            raise _broken(folder, "not a complete token store")
        header = read_object(folder / HEADER, code=Code.INPUT_CORPUS)
        try:
            dtype = TOKEN_DTYPES[header["dtype"]]
            num_tokens, shard_tokens = int(header["num_tokens"]), int(header["shard_tokens"])
            num_documents, eos = int(header["num_documents"]), int(header["eos_token_id"])
            if min(num_tokens, shard_tokens, num_documents) < 1:
                raise ValueError("a count below 1")
            lengths = [
                min(shard_tokens, num_tokens - start)
                for start in range(0, num_tokens, shard_tokens)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(folder / HEADER, f"not a token store's header: {error}") from error
        return cls(
            folder,
            num_tokens,
            eos,
            _map(folder / DOCUMENTS, DOCUMENT_DTYPE, num_documents),
            tuple(_map(folder / shard_file(i), dtype, n) for i, n in enumerate(lengths)),
            shard_tokens,
        )

    def windows(self, seq_len: int) -> int:
        """How many whole windows of `seq_len` tokens there are; INPUT_CORPUS when not even one."""
        count = self.num_tokens // seq_len
        if count == 0:
            raise ParetronError(
                Problem(
                    Code.INPUT_CORPUS,
                    f"{self.num_tokens} tokens of text, but one window needs {seq_len}",
                    where=str(self.folder),
                    fix=f"more text, or a seq_len of at most {self.num_tokens}",
                )
            )
        return count

    def window(self, index: int, seq_len: int) -> torch.Tensor:
        """Window number `index`: int64 [seq_len], the tokens from `index * seq_len` on."""
        if not 0 <= index < self.windows(seq_len):
            raise IndexError(f"window {index} of {self.windows(seq_len)}")
        return self.tokens(index * seq_len, seq_len)

    def tokens(self, first: int, count: int) -> torch.Tensor:
        """`count` tokens from number `first` on: int64 [count]."""
        out = np.empty(count, dtype=np.int64)
        filled = 0
        while filled < count:
            shard, offset = divmod(first + filled, self._shard_tokens)
            part = self._shards[shard][offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return torch.from_numpy(out)

    def positions(self, first: int, count: int) -> torch.Tensor:
        """How far each of these tokens is from where its document begins: int64 [count].

        What a document has before them does not count, so the first position is always 0.
        """
        inside = np.searchsorted(self.document_starts, [first + 1, first + count])
        begins = np.zeros(count, dtype=np.int64)
        starts = self.document_starts[slice(*inside)].astype(np.int64) - first
        begins[starts] = starts
        return torch.from_numpy(np.arange(count) - np.maximum.accumulate(begins))


def sample_windows(store: TokenStore, count: int, seq_len: int, seed: int) -> torch.Tensor:
    """`count` different windows drawn by seed: int64 [count, seq_len].

    INPUT_CORPUS when the store has fewer.
    """
    available = store.windows(seq_len)
    if count > available:
        raise ParetronError(
            Problem(
                Code.INPUT_CORPUS,
                f"{count} windows of {seq_len} tokens are asked for, the text holds {available}",
                where=str(store.folder),
                fix=f"more text, or at most {available} samples",
            )
        )
    ids = (window_id(i, num_windows=available, seed=seed) for i in range(count))
    return torch.stack([store.window(i, seq_len) for i in ids])


def _map(path: Path, dtype: IntType, length: int) -> IntArray:
    found = path.stat().st_size if path.is_file() else 0
    if found != length * dtype.itemsize:
        raise _broken(path, f"{found} bytes, not the {length * dtype.itemsize} of the header")
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,))


def _broken(path: Path, cause: str) -> ParetronError:
    fix = "remove the folder; the next run tokenises the text again"
    return ParetronError(Problem(Code.INPUT_CORPUS, cause, where=str(path), fix=fix))
