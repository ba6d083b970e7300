"""Which windows a step reads: a pure function of seed and step, so resuming needs no state."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

_ROUNDS = 8
_MASK = (1 << 64) - 1


def batch_window_ids(step: int, *, global_batch: int, num_windows: int, seed: int) -> list[int]:
    """The windows of one step over all ranks: samples `step * global_batch` and on.

    Sample number k alone decides the window, whatever the batch size. Every epoch of
    `num_windows` samples is another permutation: no window repeats inside it.
    """
    first = step * global_batch
    return [
        window_id(k, num_windows=num_windows, seed=seed) for k in range(first, first + global_batch)
    ]


def window_id(sample: int, *, num_windows: int, seed: int) -> int:
    """The window of sample number `sample`, which counts from 0 through all epochs."""
    epoch, position = divmod(sample, num_windows)
    return permuted(position, size=num_windows, keys=_round_keys(seed, epoch))


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


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(hashlib.sha256(f"{seed} {epoch} {number}".encode()).digest()[:8], "big")
        for number in range(_ROUNDS)
    )


def _mix(value: int) -> int:
    """Spread every bit of a 64-bit number over all of them (multiply and shift, twice)."""
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    value = ((value ^ (value >> 32)) * 0xD6E8FEB86659FD93) & _MASK
    return value ^ (value >> 32)
