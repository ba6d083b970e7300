"""How a text goes on in windows of another length: what is unread of it, then all of it again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretron.data.order import permutation, permuted, round_keys, window_id

_Places = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Unread:
    """Runs of tokens in the order of the text, read as one sequence; `starts` and `lengths` [runs].

    A window of them is cut anywhere, so it may hold the end of a run and the beginning of the next.
    """

    starts: _Places
    lengths: _Places

    @classmethod
    def whole(cls, num_tokens: int) -> Unread:
        """A text of which nothing was read."""
        return cls(np.array([0], np.int64), np.array([num_tokens], np.int64))

    @classmethod
    def nothing(cls) -> Unread:
        """What is left of a text that was read."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def num_tokens(self) -> int:
        """Of all runs together."""
        return int(self.lengths.sum())

    def pieces(self, index: int, seq_len: int) -> list[tuple[int, int]]:
        """Where window number `index` lies in the text: (first token, tokens) in order."""
        ends = np.cumsum(self.lengths)
        place, last = index * seq_len, (index + 1) * seq_len
        found = []
        while place < last:
            run = int(np.searchsorted(ends, place, side="right"))
            length = min(int(ends[run]), last) - place
            found.append((int(self.starts[run] + self.lengths[run] - ends[run]) + place, length))
            place += length
        return found

    def without(self, windows: _Places, seq_len: int) -> Unread:
        """What is left when these windows have been read too."""
        total = self.num_tokens
        read = np.sort(windows) * seq_len
        kept_starts = np.concatenate([[0], read + seq_len])
        kept_ends = np.concatenate([read, [total]])
        ends = np.cumsum(self.lengths)
        # Between two neighbouring cuts all tokens are of one run, and all kept or all read.
        cuts = np.unique(np.concatenate([[0], ends, kept_starts, kept_ends]))
        first, last = cuts[:-1], cuts[1:]
        kept = first < kept_ends[np.searchsorted(kept_starts, first, side="right") - 1]
        first, last = first[kept], last[kept]
        run = np.searchsorted(ends, first, side="right")
        starts = first - ends[run] + self.lengths[run] + self.starts[run]
        lengths = last - first
        # Runs that touch in the text are one.
        begins = np.flatnonzero(np.concatenate([[True], starts[1:] != (starts + lengths)[:-1]]))
        if not len(starts):
            return Unread.nothing()
        return Unread(starts[begins], np.add.reduceat(lengths, begins))


@dataclass(frozen=True, eq=False)
class Continuation:
    """A text of `num_tokens` that was begun in windows of other lengths.

    First comes what its epoch has left, then epoch after epoch, from number `epoch` on. Windows of
    the whole text have their own numbers; those of what is left come after them.
    """

    num_tokens: int
    unread: Unread
    epoch: int

    @classmethod
    def after(
        cls, lengths: Iterable[tuple[int, int]], *, num_tokens: int, seed: int
    ) -> Continuation:
        """What comes after `lengths`: so many windows (second) of so many tokens (first) each.

        No token is read twice in an epoch. What is too little for a window is left out: of each
        epoch less than one window.
        """
        found = cls(num_tokens, Unread.nothing(), 0)
        for seq_len, windows in lengths:
            found = found._after(seq_len, windows, seed)
        return found

    def window_id(self, sample: int, *, seq_len: int, seed: int) -> int:
        """The window of sample number `sample`, counted from 0 where this length begins."""
        whole, left = self.num_tokens // seq_len, self.unread.num_tokens // seq_len
        if sample < left:
            return whole + permuted(sample, size=left, keys=self._keys(seq_len, seed))
        return window_id(self.epoch * whole + sample - left, num_windows=whole, seed=seed)

    def _after(self, seq_len: int, windows: int, seed: int) -> Continuation:
        whole, left = self.num_tokens // seq_len, self.unread.num_tokens // seq_len
        if windows < left:
            read = permutation(windows, size=left, keys=self._keys(seq_len, seed))
            return Continuation(self.num_tokens, self.unread.without(read, seq_len), self.epoch)
        epochs, begun = divmod(windows - left, whole)
        epoch = self.epoch + epochs
        if not begun:
            return Continuation(self.num_tokens, Unread.nothing(), epoch)
        read = permutation(begun, size=whole, keys=round_keys(seed, str(epoch)))
        unread = Unread.whole(self.num_tokens).without(read, seq_len)
        return Continuation(self.num_tokens, unread, epoch + 1)

    def _keys(self, seq_len: int, seed: int) -> tuple[int, ...]:
        return round_keys(seed, f"{self.epoch} left {self.unread.num_tokens} {seq_len}")
