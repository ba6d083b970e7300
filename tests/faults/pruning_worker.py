"""Prunes on request, each time in a forked child that the test may kill: torch is imported once.

A line on standard input is a job; the answers are the child's pid, then its exit code. One that
fails says why on standard error; `grown` names a file for the bytes by which its memory grew.
"""

from __future__ import annotations

import errno
import io
import json
import locale
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.errors import ParetronError
from paretron.families import sizes
from paretron.recipe import Prune, Score
from paretron.surgery.prune import prune


class Disk(io.FileIO):
    """Files of a disk that is full after a number of writes, whoever made them."""

    writes_left = 0

    def write(self, data: Any, /) -> int:
        """As usual, or ENOSPC."""
        if Disk.writes_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Disk.writes_left -= 1
        return super().write(data)


def fill_disk_after(writes: int) -> None:
    """From now on that many writes succeed."""
    Disk.writes_left, real = writes, io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "w" not in mode:
            return real(file, mode, *arguments, **named)
        binary = io.BufferedWriter(Disk(file, "w"))
        return binary if "b" in mode else io.TextIOWrapper(binary, "utf-8", write_through=True)

    io.open = opened


def memory_bytes(key: str) -> int:
    """A figure of this process, e.g. "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def work(job: dict[str, Any]) -> int:
    """One pruning of a model to half of its MLP; the exit code of the command line."""
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job.get("more_memory"):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes("VmSize") + job["more_memory"],) * 2)
    if "writes" in job:
        fill_disk_after(job["writes"])
    os.environ.update(job.get("environment", {}))
    time.tzset()
    locale.setlocale(locale.LC_ALL, "")
    os.chdir(job.get("folder", "."))
    torch.set_num_threads(job.get("threads", 1))
    before = memory_bytes("VmHWM")
    checkpoint = Checkpoint.open(Path(job["model"]))
    size = sizes(checkpoint.family, checkpoint.config)
    try:
        prune(
            Path(job["model"]),
            Path(job["scores"]),
            sizes=size | {"ffn": size["ffn"] // 2},
            prune=Prune(max_shard_gb=job.get("max_shard_gb", 1e-4)),
            score=Score(),
            out=Path(job["out"]),
            provenance=Provenance(kind="student", settings={"name": job["name"]}),
            overwrite=job.get("overwrite", False),
            on_event=lambda kind, fields: time.sleep(job.get("pause_s", 0.0)),
        )
    except ParetronError as error:
        print(json.dumps(str(error)), file=sys.stderr, flush=True)
        return error.exit_code
    if "grown" in job:
        Path(job["grown"]).write_text(str(memory_bytes("VmHWM") - before))
    return 0


def main() -> None:
    """Serve jobs until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(work(job))
        print(pid, flush=True)
        if "kill_after_s" in job:
            time.sleep(job["kill_after_s"])
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the number is still its own
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
