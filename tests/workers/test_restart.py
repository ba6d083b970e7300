"""A process that is killed: torchrun starts all of them again, and they find each other."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from paretron.workers.world import joined_world

WORKER = Path(__file__).with_name("restarted.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_processes_that_were_started_again_find_each_other(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--max-restarts", "1", "--master-port", str(free_port()), str(WORKER), str(tmp_path)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "attempt-0-rank-0-sum-1", "attempt-0-rank-1-sum-1",
        "attempt-1-rank-0-sum-1", "attempt-1-rank-1-sum-1",
    ]  # fmt: skip


def test_a_process_alone_needs_nobody() -> None:
    with joined_world() as world:
        assert (world.rank, world.size) == (0, 1)
