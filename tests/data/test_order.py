from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretron.data.order import Stretch, permutation, permuted, round_keys, window_id

SEEDS = st.integers(0, 2**31 - 1)


def samples(first: int, count: int, *, num_windows: int, seed: int) -> list[int]:
    return [window_id(k, num_windows=num_windows, seed=seed) for k in range(first, first + count)]


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**9))
def test_an_epoch_shows_every_window_once(size: int, seed: int, epoch: int) -> None:
    ids = samples(epoch * size, size, num_windows=size, seed=seed)
    assert sorted(ids) == list(range(size))


@given(size=st.integers(2**40, 2**62), seed=SEEDS, sample=st.integers(0, 2**62))
def test_a_corpus_of_any_size_needs_no_table(size: int, seed: int, sample: int) -> None:
    assert 0 <= window_id(sample, num_windows=size, seed=seed) < size


@given(size=st.integers(1, 5000), share=st.floats(0, 1), seed=SEEDS)
def test_all_at_once_is_one_by_one(size: int, share: float, seed: int) -> None:
    keys, count = round_keys(seed, "x"), round(share * size)
    one_by_one = [permuted(k, size=size, keys=keys) for k in range(count)]
    assert permutation(count, size=size, keys=keys).tolist() == one_by_one


@given(
    counts=st.lists(st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 4])), max_size=5),
    num_blocks=st.integers(1, 40),
    seed=SEEDS,
)
def test_stretches_share_no_token_before_all_are_read(
    counts: list[tuple[int, int]], num_blocks: int, seed: int
) -> None:
    """A block is four tokens here, and a window one, two or four."""
    blocks: list[Counter[int]] = []
    first = 0
    for count, per_block in counts:
        stretch = Stretch(first, count, per_block)
        read = [
            stretch.window_id(k, num_blocks=num_blocks, seed=seed) for k in range(count * per_block)
        ]
        assert all(0 <= window < num_blocks * per_block for window in read)
        # samples of an epoch stand together, so its tokens can be told from the next one's
        for place in range(count):
            epoch = (first + place) // num_blocks
            blocks += [Counter()] * (epoch + 1 - len(blocks))
            windows = read[place * per_block : (place + 1) * per_block]
            size = 4 // per_block
            tokens = [w * size + k for w in windows for k in range(size)]
            blocks[epoch] = blocks[epoch] + Counter(tokens)
        first += count
    for epoch, counted in enumerate(blocks):
        assert set(counted.values()) == {1}
        read_blocks = min(first - epoch * num_blocks, num_blocks)
        assert len(counted) == 4 * read_blocks


def test_a_stretch_of_whole_blocks_is_the_plain_order() -> None:
    stretch = Stretch(7, 90, 1)
    ids = [stretch.window_id(k, num_blocks=50, seed=3) for k in range(90)]
    assert ids == samples(7, 90, num_windows=50, seed=3)


def test_windows_of_one_block_come_far_from_each_other() -> None:
    stretch = Stretch(0, 200, 4)
    ids = [stretch.window_id(k, num_blocks=200, seed=0) for k in range(800)]
    neighbours = sum(a // 4 == b // 4 for a, b in pairwise(ids))
    assert neighbours < 12  # by chance: 3 of 799 for each window


def test_seeds_and_epochs_differ() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return samples(number * 200, 200, num_windows=200, seed=seed)

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1), list(range(200))]
    assert len({tuple(order) for order in orders}) == len(orders)
    # Unrelated permutations agree in about one place of all.
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 8


def test_every_window_is_as_likely_at_every_place() -> None:
    places, seeds = 12, 6000
    seen = Counter(
        (place, window_id(place, num_windows=places, seed=seed))
        for seed in range(seeds)
        for place in range(places)
    )
    expected = seeds / places
    chi_square = sum(
        (seen[place, window] - expected) ** 2 / expected
        for place in range(places)
        for window in range(places)
    )
    # 121 degrees of freedom: beyond 200 once in 100,000 times.
    assert chi_square < 200


@pytest.mark.parametrize("per_block", [1, 2])
def test_the_order_is_the_one_of_yesterday(per_block: int) -> None:
    """A resumed run continues with these windows: a change here breaks every checkpoint."""
    stretch = Stretch(0, 600, per_block)
    ids = [stretch.window_id(k, num_blocks=1000, seed=7) for k in range(18, 24)]
    wanted = {1: [536, 520, 541, 140, 159, 825], 2: [867, 1426, 1339, 790, 791, 944]}
    assert ids == wanted[per_block]
