"""One process of a scoring: `python -m paretron.importance.worker JOB_FILE PIPE`."""

from __future__ import annotations

import sys
from pathlib import Path

from paretron.importance.stage import Job, run_job
from paretron.workers.launch import OnEvent
from paretron.workers.worker import leave, work


def _score(job: str, on_event: OnEvent) -> None:
    run_job(Job.from_json(job), on_event=on_event)


if __name__ == "__main__":
    leave(work(_score, Path(sys.argv[1]), Path(sys.argv[2])))
