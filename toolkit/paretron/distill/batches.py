"""Windows of a token store as batches of input and label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from paretron.data.store import TokenStore
from paretron.data.unread import Unread
from paretron.distill.losses import IGNORE
from paretron.errors import Code, ParetronError, Problem


@dataclass(frozen=True)
class Batch:
    """input_ids and labels [batch, seq]: a position's label is the token that comes next.

    `window_ids` [batch] says which windows of the store they are. `position_ids` [batch, seq] begin
    at 0 with every document where documents are apart: from that, attention too knows where they
    end. None where a window is one text.
    """

    input_ids: Tensor
    labels: Tensor
    window_ids: tuple[int, ...]
    position_ids: Tensor | None = None

    @property
    def valid(self) -> int:
        """How many positions count."""
        return int((self.labels != IGNORE).sum())

    def split(self, micro_batch: int) -> list[Batch]:
        """The same in parts of `micro_batch` windows."""
        parts = [slice(k, k + micro_batch) for k in range(0, len(self.window_ids), micro_batch)]
        return [self._each(itemgetter(part), self.window_ids[part]) for part in parts]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return self._each(lambda x: x.to(device, non_blocking=True), self.window_ids)

    def ignored(self) -> Batch:
        """The same windows, of which nothing counts: for a process that has run out of data."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    def _each(self, change: Callable[[Tensor], Tensor], window_ids: tuple[int, ...]) -> Batch:
        positions = None if self.position_ids is None else change(self.position_ids)
        return Batch(change(self.input_ids), change(self.labels), window_ids, positions)


@dataclass(frozen=True)
class Windows:
    """A token store seen as numbered windows of `seq_len` tokens, for a model of `vocab_size`.

    With `apart`, what a window holds of each document is a text of its own. Where the text was
    begun in windows of another length, those of what is `unread` come after those of the whole.
    """

    store: TokenStore
    seq_len: int
    vocab_size: int
    apart: bool = False
    unread: Unread | None = None

    def __len__(self) -> int:
        return self.store.windows(self.seq_len)

    def batch(self, window_ids: Sequence[int]) -> Batch:
        """These windows as one batch; INPUT_TOKENIZER when a token is not in the vocabulary."""
        places = [self._pieces(i) for i in window_ids]
        input_ids = torch.stack([self._joined(self.store.tokens, pieces) for pieces in places])
        largest = int(input_ids.max())
        if largest >= self.vocab_size:
            raise ParetronError(
                Problem(
                    Code.INPUT_TOKENIZER,
                    f"the text holds token {largest}, the model knows {self.vocab_size}",
                    where=str(self.store.folder),
                    fix="tokenise the text with the model's own tokenizer",
                )
            )
        labels = torch.full_like(input_ids, IGNORE)
        labels[:, :-1] = input_ids[:, 1:]  # what follows a window's last token is not in it
        for row, pieces in zip(labels, places, strict=True):
            for seam in accumulate(length for _, length in pieces[:-1]):
                row[seam - 1] = IGNORE  # what comes next stands elsewhere in the text
        if not self.apart:
            return Batch(input_ids, labels, tuple(window_ids))
        positions = torch.stack([self._joined(self.store.positions, pieces) for pieces in places])
        # The end of a document says nothing of how the next one begins.
        labels[:, :-1].masked_fill_(positions[:, 1:] == 0, IGNORE)
        return Batch(input_ids, labels, tuple(window_ids), positions)

    def _pieces(self, index: int) -> list[tuple[int, int]]:
        """Where a window lies in the text: (first token, tokens); most are in one piece."""
        whole = len(self)
        if self.unread is not None and index >= whole:
            return self.unread.pieces(index - whole, self.seq_len)
        if not 0 <= index < whole:
            raise IndexError(f"window {index} of {whole}")
        return [(index * self.seq_len, self.seq_len)]

    def _joined(self, read: Callable[[int, int], Tensor], pieces: list[tuple[int, int]]) -> Tensor:
        return torch.cat([read(first, count) for first, count in pieces])
