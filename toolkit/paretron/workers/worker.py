"""What every worker process does around its task: it speaks to its parent, and dies with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from paretron.errors import ParetronError
from paretron.workers.launch import OnEvent
from paretron.workers.relay import RelayWriter

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def work(task: Callable[[str, OnEvent], None], job_file: Path, pipe: Path) -> int:
    """Take part in the task, called with the job file's text; the exit code is its error's."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no worker outlives torchrun
    rank = int(os.environ.get("RANK", "0"))
    relay = RelayWriter(pipe, rank=rank)
    if rank == 0:
        relay.pid()
    try:
        task(job_file.read_text("utf-8"), relay.event)
    except ParetronError as error:
        relay.problems(error)
        return error.exit_code
    except BaseException as error:
        relay.failure(error)
        raise
    return 0


def leave(code: int) -> NoReturn:
    """End this process at once, its work done: threads of the communication library that still
    run when an interpreter is taken apart can abort it (seen with gloo), and a finished task
    would look failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
