"""Prunes on request, each time in a forked child that the test may kill: torch is imported once.

A line on standard input is a job; the answers are the child's pid, then its exit code.
"""

from __future__ import annotations

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


def work(job: dict[str, Any]) -> int:
    """One pruning of a pico model to half of its MLP; the exit code of the command line."""
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    os.environ.update(job.get("environment", {}))
    time.tzset()
    locale.setlocale(locale.LC_ALL, "")
    os.chdir(job.get("folder", "."))
    torch.set_num_threads(job.get("threads", 1))
    checkpoint = Checkpoint.open(Path(job["model"]))
    size = sizes(checkpoint.family, checkpoint.config)
    try:
        prune(
            Path(job["model"]),
            Path(job["scores"]),
            sizes=size | {"ffn": size["ffn"] // 2},
            prune=Prune(max_shard_gb=1e-4),
            score=Score(),
            out=Path(job["out"]),
            provenance=Provenance(kind="student", settings={"name": job["name"]}),
            overwrite=job.get("overwrite", False),
            on_event=lambda kind, fields: time.sleep(job.get("pause_s", 0.0)),
        )
    except ParetronError as error:
        print(json.dumps(str(error)), file=sys.stderr, flush=True)
        return error.exit_code
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
