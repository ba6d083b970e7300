"""One of two processes: sum, note the sum; in the first attempt one is killed then. argv: DIR."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from paretron.workers.world import joined_world


def main(folder: Path) -> None:
    """Join the others and sum up the ranks."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    with joined_world(timeout_s=60) as world:
        (ranks,) = world.total(float(world.rank))
        (folder / f"attempt-{attempt}-rank-{world.rank}-sum-{ranks:.0f}").touch()
        world.total(0.0)
        if attempt == "0" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.total(0.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
