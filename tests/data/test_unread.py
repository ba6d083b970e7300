"""A text read in windows of one length after the other: every token once an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paretron.data.order import window_id
from paretron.data.unread import Continuation, Unread

SEEDS = st.integers(0, 2**31 - 1)
LENGTHS = st.lists(
    st.tuples(st.sampled_from([3, 16, 32, 64, 128]), st.integers(1, 60)), min_size=1, max_size=5
)


def tokens_of(continuation: Continuation, window: int, seq_len: int) -> list[int]:
    whole = continuation.num_tokens // seq_len
    if window < whole:
        return list(range(window * seq_len, (window + 1) * seq_len))
    pieces = continuation.unread.pieces(window - whole, seq_len)
    return [t for first, count in pieces for t in range(first, first + count)]


@given(lengths=LENGTHS, num_tokens=st.integers(128, 1500), seed=SEEDS)
def test_no_token_is_read_twice_before_all_are_read(
    lengths: list[tuple[int, int]], num_tokens: int, seed: int
) -> None:
    read: list[int] = []
    skipped = 0  # at most: what is too little for one window, at every end of an epoch
    for number, (seq_len, windows) in enumerate(lengths):
        begun = Continuation.after(lengths[:number], num_tokens=num_tokens, seed=seed)
        left = begun.unread.num_tokens // seq_len
        if windows and not left:  # what there was is too little for even one
            skipped += begun.unread.num_tokens
        for sample in range(windows):
            found = tokens_of(begun, begun.window_id(sample, seq_len=seq_len, seed=seed), seq_len)
            assert len(found) == seq_len
            read += found
            at_end = sample + 1 - left
            if at_end >= 0 and at_end % (num_tokens // seq_len) == 0:
                skipped += seq_len - 1
    times = Counter(read)
    assert set(times) <= set(range(num_tokens))
    counts = [times[token] for token in range(num_tokens)]
    epochs = max(counts)
    # A token that was read less often than another by two was skipped once.
    missed = sum(max(0, epochs - 1 - count) for count in counts)
    assert missed <= skipped


def test_lengths_that_change_three_times_read_all_of_an_epoch() -> None:
    num_tokens, seed = 4096, 5
    read: list[int] = []
    lengths = [(64, 20), (128, 10), (32, 48)]
    for number, (seq_len, windows) in enumerate(lengths):
        begun = Continuation.after(lengths[:number], num_tokens=num_tokens, seed=seed)
        for sample in range(windows):
            read += tokens_of(begun, begun.window_id(sample, seq_len=seq_len, seed=seed), seq_len)
    assert sorted(read) == list(range(num_tokens))
    after = Continuation.after(lengths, num_tokens=num_tokens, seed=seed)
    assert (after.unread.num_tokens, after.epoch) == (0, 1)
    ids = [after.window_id(sample, seq_len=64, seed=seed) for sample in range(64)]
    assert ids == [window_id(64 + sample, num_windows=64, seed=seed) for sample in range(64)]


def test_nothing_before_is_the_plain_order() -> None:
    begun = Continuation.after([], num_tokens=1000, seed=3)
    ids = [begun.window_id(k, seq_len=30, seed=3) for k in range(100)]
    assert ids == [window_id(k, num_windows=33, seed=3) for k in range(100)]


def test_most_windows_of_what_is_left_are_in_one_piece() -> None:
    """A tenth was read in short windows: longer ones mostly find text that goes on."""
    begun = Continuation.after([(64, 100)], num_tokens=64_000, seed=1)
    assert begun.unread.num_tokens == 57_600
    pieces = [len(begun.unread.pieces(k, 256)) for k in range(57_600 // 256)]
    assert sum(count == 1 for count in pieces) > len(pieces) // 2


def test_runs_that_touch_are_one() -> None:
    left = Unread.whole(100).without(np.array([1, 4]), 10)
    assert (left.starts.tolist(), left.lengths.tolist()) == ([0, 20, 50], [10, 20, 50])
    assert left.pieces(2, 15) == [(50, 15)]
    assert left.pieces(0, 15) == [(0, 10), (20, 5)]
    assert left.without(np.array([0]), 15).starts.tolist() == [25, 50]
    assert Unread.whole(30).without(np.array([0, 1, 2]), 10).num_tokens == 0
