"""Prunes on request, each time in a forked child that the test may kill: torch is imported once.

A line on standard input is a job; the answers are the child's pid, then its exit code.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

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
        pid = os.fork()
        if pid == 0:
            os._exit(work(json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
