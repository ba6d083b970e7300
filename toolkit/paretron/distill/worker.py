"""One process of a launched training: `python -m paretron.distill.worker JOB_FILE PIPE`."""

from __future__ import annotations

import sys
from pathlib import Path

from paretron.distill.job import Job
from paretron.distill.stage import run_job
from paretron.workers.launch import OnEvent
from paretron.workers.worker import leave, work


def main(job_file: Path, pipe: Path) -> int:
    """Take part in the job; the exit code is that of its error."""
    return work(_train, job_file, pipe)


def _train(job: str, on_event: OnEvent) -> None:
    run_job(Job.from_json(job), on_event=on_event)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
