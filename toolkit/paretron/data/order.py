"""Which windows a training reads: pure functions of seed and place, so resuming needs no state."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Stretch:
    """`count` blocks from the `first` one in the order of reading; each holds `per_block` windows.

    Stretches that follow one another share no block, so they may read in windows of any length.
    """

    first: int
    count: int
    per_block: int

    def window_id(self, sample: int, *, num_blocks: int, seed: int) -> int:
        """The window of sample number `sample`, counted from 0 in the stretch.

        Windows of one block come far from each other: those of all the stretch's blocks of an epoch
        are shuffled. An epoch is `num_blocks` blocks.
        """
        place, part = divmod(sample, self.per_block)
        if self.per_block > 1:
            epoch = (self.first + place) // num_blocks
            begin = max(self.first, epoch * num_blocks)
            end = min(self.first + self.count, (epoch + 1) * num_blocks)
            shuffled = permuted(
                sample - (begin - self.first) * self.per_block,
                size=(end - begin) * self.per_block,
                keys=round_keys(seed, f"{epoch} {begin}"),
            )
            place, part = divmod(shuffled, self.per_block)
            place += begin - self.first
        block = window_id(self.first + place, num_windows=num_blocks, seed=seed)
        return block * self.per_block + part


def window_id(sample: int, *, num_windows: int, seed: int) -> int:
    """The window of sample number `sample`, which counts from 0 through all epochs."""
    epoch, position = divmod(sample, num_windows)
    return permuted(position, size=num_windows, keys=round_keys(seed, str(epoch)))


def permuted(position: int, *, size: int, keys: tuple[int, ...]) -> int:
    """Where a pseudo-random bijection of range(size) sends `position`, in constant memory.

    A Feistel network on pairs (left, right) of a grid just larger than `size`: each round adds a
    hash of one half to the other, which can be undone. A result outside of range(size) goes
    through again until it falls inside; that walk along a cycle keeps the map one-to-one.
    """
    width = math.isqrt(size - 1) + 1
    height = -(-size // width)
    while True:
        left, right = divmod(position, width)
        for number, key in enumerate(keys):
            if number % 2:
                right = (right + _mix(left ^ key)) % width
            else:
                left = (left + _mix(right ^ key)) % height
        position = left * width + right
        if position < size:
            return position


def permutation(count: int, *, size: int, keys: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Where `permuted` sends the first `count` positions, all at once."""
    columns = math.isqrt(size - 1) + 1
    width, height = np.uint64(columns), np.uint64(-(-size // columns))
    places = np.arange(count, dtype=np.uint64)
    walking = np.ones(count, dtype=bool)
    while walking.any():
        left, right = np.divmod(places[walking], width)
        for number, key in enumerate(keys):
            # The remainder first: a sum would not fit into 64 bits.
            if number % 2:
                right = (right + _mix_all(left ^ np.uint64(key)) % width) % width
            else:
                left = (left + _mix_all(right ^ np.uint64(key)) % height) % height
        places[walking] = left * width + right
        walking = places >= size
    return places.astype(np.int64)


@lru_cache(maxsize=8)
def round_keys(seed: int, epoch: str) -> tuple[int, ...]:
    """What the rounds of a bijection add: of other numbers or names, another order."""
    return tuple(
        int.from_bytes(hashlib.sha256(f"{seed} {epoch} {number}".encode()).digest()[:8], "big")
        for number in range(_ROUNDS)
    )


def _mix(value: int) -> int:
    """Spread every bit of a 64-bit number over all of them (multiply and shift, twice)."""
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value ^ (value >> 32)


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """`_mix` of each; 64-bit products wrap as they should."""
    for _ in range(2):
        values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))
