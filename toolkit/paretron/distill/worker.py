"""One process of a launched training: `python -m paretron.distill.worker JOB_FILE PIPE`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from paretron.distill.job import Job
from paretron.distill.relay import RelayWriter
from paretron.distill.stage import run_job
from paretron.errors import ParetronError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(job_file: Path, pipe: Path) -> int:
    """Take part in the job; the exit code is that of its error."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives torchrun
    rank = int(os.environ.get("RANK", "0"))
    relay = RelayWriter(pipe, rank=rank)
    if rank == 0:
        relay.pid()
    try:
        run_job(Job.from_json(job_file.read_text("utf-8")), on_event=relay.event)
    except ParetronError as error:
        relay.problems(error)
        return error.exit_code
    except BaseException as error:
        relay.failure(error)
        raise
    return 0


def leave(code: int) -> NoReturn:
    """End this process at once, its work done: threads of the communication library that still
    run when an interpreter is taken apart can abort it (seen with gloo), and a finished training
    would look failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), Path(sys.argv[2])))
