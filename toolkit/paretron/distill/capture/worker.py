"""One process of a capture: `python -m paretron.distill.capture.worker JOB_FILE PIPE`."""

from __future__ import annotations

import sys
from pathlib import Path

from paretron.distill.capture.stage import CaptureJob, run_job
from paretron.workers.launch import OnEvent
from paretron.workers.worker import leave, work


def _capture(job: str, on_event: OnEvent) -> None:
    run_job(CaptureJob.from_json(job), on_event=on_event)


if __name__ == "__main__":
    leave(work(_capture, Path(sys.argv[1]), Path(sys.argv[2])))
