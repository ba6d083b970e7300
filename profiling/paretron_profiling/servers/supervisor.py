"""The process that starts a server, says when it answers, and takes it down; standard library only.

Started as `python -I supervisor.py ANSWER_FD SETTINGS_JSON` in the environment that the
server is to have, settings `{command, scratch, url, grace_s}`. The first answer comes when the
server lists its models: `{models: [...]}`, the entries of `/v1/models`; each line on standard input
then asks whether it still does. When standard input closes, whoever started this wants the server
gone, or is gone: the server's group gets SIGTERM, and after `grace_s` every process that came from
it SIGKILL, whatever session it made for itself; then the scratch folder is removed. When the server
ends by itself, what it left behind is killed and this process ends the same way.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL_S = 0.1
REAP_S = 0.01
SETTLE_S = 2.0  # a server that lost its engine takes a moment to give up
ASK_TIMEOUT_S = 10.0
FIRST_TIMEOUT_S = 1.0  # while it starts: another may hold the port, and never answer
LARGEST_LIST = 1 << 20
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def prctl(option: int, value: int) -> None:
    """Ask the kernel for one of its services to processes; nothing where it is not Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Every process below this one, with those whose parent ended: they became our children."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():
        with suppress(OSError, ValueError, IndexError):
            if entry.isdigit():
                state = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                parents[int(entry)] = int(state[1])
    found: list[int] = []
    layer = {os.getpid()}
    while layer:
        layer = {pid for pid, parent in parents.items() if parent in layer}
        found += layer
    return found


def models_of(url: str, *, timeout_s: float) -> list[Any]:
    """The entries of a server's list of models; OSError or ValueError while it has none."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/v1/models", timeout=timeout_s) as said:
        listed = json.loads(said.read(LARGEST_LIST))
    if not (isinstance(listed, dict) and isinstance(listed.get("data"), list) and listed["data"]):
        raise ValueError("no list of models")
    return list(listed["data"])


class Supervised:
    """The server's process and all that came from it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._scratch, self._grace_s = settings["scratch"], settings["grace_s"]
        prctl(_SET_CHILD_SUBREAPER, 1)
        self._process = subprocess.Popen(
            settings["command"],
            stdin=subprocess.DEVNULL,
            cwd=self._scratch,
            start_new_session=True,
            # Should this process be killed outright, the server goes with it.
            preexec_fn=lambda: prctl(_SET_PDEATHSIG, signal.SIGKILL),
        )
        self._ending = threading.RLock()  # a signal may come while we are ending

    def status(self, *, within_s: float = 0.0) -> int | None:
        """How the server ended, as subprocess says it; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.returncode

    def end(self, *, remove: bool) -> None:
        """Take everything down, once; `remove`: also the scratch folder."""
        with self._ending:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace_s)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            while left := descendants():
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._reap()
            if remove:
                shutil.rmtree(self._scratch, ignore_errors=True)

    def _reap(self) -> None:
        """Take leave of the dead: a zombie is still a descendant."""
        time.sleep(REAP_S)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def watch_input(server: Supervised, asked: threading.Semaphore) -> None:
    """Count the questions; at the end of input, end the server and this process."""
    for _ in sys.stdin:
        asked.release()
    server.end(remove=True)
    os._exit(0)


def end_like(status: int) -> None:
    """End as the server did, so that who waits for us learns it."""
    if status < 0:
        if -status == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> None:
    """Start the server, say when it answers, answer questions, until it or the input ends."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    settings = json.loads(sys.argv[2])
    server = Supervised(settings)
    asked = threading.Semaphore(1)  # the first question needs no line
    threading.Thread(target=watch_input, args=(server, asked), daemon=True).start()

    def asked_to_end(*_: object) -> None:
        server.end(remove=True)
        os._exit(1)

    signal.signal(signal.SIGTERM, asked_to_end)
    healthy = False
    while (status := server.status()) is None:
        if not asked.acquire(timeout=POLL_S):
            continue
        answer: dict[str, Any] = {"models": []}
        try:
            wait_s = ASK_TIMEOUT_S if healthy else FIRST_TIMEOUT_S
            answer = {"models": models_of(settings["url"], timeout_s=wait_s)}
            healthy = True
        except (OSError, ValueError):
            if not healthy:  # still starting: the question stands
                asked.release()
                time.sleep(POLL_S)
                continue
            if server.status(within_s=SETTLE_S) is not None:
                continue  # rather than an answer: how it ended
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    server.end(remove=False)
    end_like(status)


if __name__ == "__main__":
    main()
