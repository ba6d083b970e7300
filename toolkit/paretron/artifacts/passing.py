"""Reading large files once without pushing what others use out of the page cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 23  # the disk streams and calls are few, yet the processor's caches are near


def blocks_of(
    path: Path, *, start: int = 0, end: int | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a file from `start` to `end`, in blocks [block_bytes] with memory of their own.

    The last one may be shorter, and ends the blocks where the file ends before. A range whose ends
    lie in the page cache stays there, any other is dropped as it passes: filling the cache with
    what nobody reads again can cost more than the reading.
    """
    with path.open("rb", buffering=0) as f:
        fd = f.fileno()
        end = os.fstat(fd).st_size if end is None else end
        held = end > start and _is_held(fd, start) and _is_held(fd, end - 1)
        for position in range(start, end, block_bytes):
            nbytes = min(block_bytes, end - position)
            block = np.empty(nbytes, dtype=np.uint8)
            done = _fill(fd, block.data, position)
            if not held:
                os.posix_fadvise(fd, position, nbytes, os.POSIX_FADV_DONTNEED)
            if done:
                yield block[:done]
            if done < nbytes:
                return


def _fill(fd: int, into: memoryview, start: int) -> int:
    done = 0
    while done < len(into) and (got := os.preadv(fd, [into[done:]], start + done)):
        done += got
    return done


def _is_held(fd: int, position: int) -> bool:
    """Whether the page cache holds a byte; False where the file system cannot tell."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # asking must not fetch what lies around it
    try:
        return os.preadv(fd, [bytearray(1)], position, os.RWF_NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
