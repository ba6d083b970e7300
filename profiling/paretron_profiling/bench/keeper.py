"""Runs a program, and ends it with whoever started this: `python -I keeper.py COMMAND...`.

Standard input is a pipe that its starter holds and never writes to. When it closes, the starter is
gone, and so is this process group, the program in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from paretron_profiling.servers.supervisor import end_like


def watch_input() -> None:
    """Wait for the end of the input, and end the group."""
    sys.stdin.read()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run the program and end as it does."""
    threading.Thread(target=watch_input, daemon=True).start()
    end_like(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL).wait())


if __name__ == "__main__":
    main()
