"""A process that waits for ever says where, and ends: the stacks of its threads in a file."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paretron.workers.world import World

_PREFIX = "stalled-rank-"


@contextmanager
def stall_watch(folder: Path, world: World, *, timeout_s: int) -> Iterator[Callable[[], None]]:
    """Yield a function to be called whenever the training moves.

    One of several processes that has called it, and then does not for `timeout_s` seconds, writes
    every thread's stack into `folder` and exits with 1, even from within a collective call that no
    Python code can leave. A process alone waits for nobody: it is not watched.
    """
    if world.mesh is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{world.rank}.txt"
    with path.open("w") as stacks:
        try:
            yield lambda: faulthandler.dump_traceback_later(timeout_s, file=stacks, exit=True)
        finally:
            faulthandler.cancel_dump_traceback_later()
    path.unlink()


def stalled(folder: Path) -> list[Path]:
    """The files of the processes that ended so."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*.txt") if p.stat().st_size)
