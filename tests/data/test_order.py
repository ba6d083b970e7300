from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from paretron.data.order import batch_window_ids, window_id

SEEDS = st.integers(0, 2**31 - 1)


@given(size=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**9))
def test_an_epoch_shows_every_window_once(size: int, seed: int, epoch: int) -> None:
    first = epoch * size
    ids = [window_id(k, num_windows=size, seed=seed) for k in range(first, first + size)]
    assert sorted(ids) == list(range(size))


@given(size=st.integers(2**40, 2**62), seed=SEEDS, sample=st.integers(0, 2**62))
def test_a_corpus_of_any_size_needs_no_table(size: int, seed: int, sample: int) -> None:
    assert 0 <= window_id(sample, num_windows=size, seed=seed) < size


@given(
    num_windows=st.integers(1, 500),
    seed=SEEDS,
    batches=st.tuples(st.integers(1, 17), st.integers(1, 17)),
)
def test_the_batch_size_does_not_change_the_order(
    num_windows: int, seed: int, batches: tuple[int, int]
) -> None:
    a, b = (
        [
            window
            for step in range(-(-60 // batch))
            for window in batch_window_ids(
                step, global_batch=batch, num_windows=num_windows, seed=seed
            )
        ]
        for batch in batches
    )
    assert a[:60] == b[:60]


def test_seeds_and_epochs_differ() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return batch_window_ids(number, global_batch=200, num_windows=200, seed=seed)

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


def test_the_order_is_the_one_of_yesterday() -> None:
    """A resumed run continues with these windows: a change here breaks every checkpoint."""
    assert batch_window_ids(3, global_batch=6, num_windows=1000, seed=7) == [
        536,
        520,
        541,
        140,
        159,
        825,
    ]
