"""A server that we start, watch and take down; the session of whatever answers over HTTP."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretron.errors import Code, ParetronError, Problem
from paretron_profiling.engines.engine import EngineSettings, Pace
from paretron_profiling.engines.worker import Worker, WorkerFailed
from paretron_profiling.schema import OFFLINE, Sample
from paretron_profiling.servers.client import LoadClient, load_client

SUPERVISOR = Path(__file__).with_name("supervisor.py")
HOST = "127.0.0.1"
START_TIMEOUT_S = 600.0
ASK_TIMEOUT_S = 15.0
GRACE_S = 15.0  # for a server to end by itself
TRIES = 3  # of free ports that another process takes before the server does


@dataclass(frozen=True)
class Command:
    """How to start a server on a port: its command line there, and its environment."""

    on_port: Callable[[int], Sequence[str]]
    environment: Mapping[str, str]


class RunningServer:
    """A server that answers, below a supervisor of ours."""

    def __init__(self, worker: Worker, *, name: str, url: str, models: list[Any], log: Path):
        self._worker, self._name, self._log = worker, name, log
        self.url, self._models = url, models

    @property
    def pid(self) -> int:
        """The supervisor's process id; the server is its child."""
        return self._worker.pid

    @property
    def model_ids(self) -> list[str]:
        """The names under which it serves."""
        return [str(m["id"]) for m in self._models if isinstance(m, dict) and "id" in m]

    def log_text(self) -> str:
        """What the server printed so far."""
        return self._log.read_text(errors="replace")

    def check_alive(self) -> None:
        """ParetronError(ENGINE) with the log's end when the server is gone or answers no more."""
        answer = _asked(self._worker, {}, name=self._name, url=self.url, timeout_s=ASK_TIMEOUT_S)
        if not answer["models"]:
            raise _stopped(self._name, "no longer answers", self.url)


class ServerSession:
    """A model behind HTTP, under our load client."""

    def __init__(
        self,
        client: LoadClient,
        *,
        pid: int | None,
        about: Mapping[str, str],
        check_alive: Callable[[], None],
    ) -> None:
        self._client, self._about, self._check_alive = client, about, check_alive
        self._pid = pid

    @property
    def pid(self) -> int | None:
        """The root of the server's processes; None of a server that others started."""
        return self._pid

    @property
    def url(self) -> str:
        """Where the server listens; for the load clients of others."""
        return self._client.url

    @property
    def model(self) -> str:
        """The name under which it serves the model."""
        return self._client.model

    @property
    def about(self) -> Mapping[str, str]:
        """What the server runs with, and what takes the times."""
        return {**self._about, **self._client.about}

    def generate(self, prompts: Sequence[Sequence[int]], output_len: int) -> Sample:
        """Send all prompts at once, each in a request of its own."""
        pace = Pace(OFFLINE, len(prompts), 0)
        return self.serve(prompts, output_len, pace=pace)

    def serve(self, prompts: Sequence[Sequence[int]], output_len: int, *, pace: Pace) -> Sample:
        """Send the prompts at a pace; times are the client's, tokens are counted, not returned."""
        try:
            sample = self._client.run(prompts, output_len, pace=pace)
        except ParetronError:
            self._check_alive()  # says why, where the server is ours
            raise
        if sample.failures:
            self._check_alive()
        return sample


@contextmanager
def running(
    command: Command, *, name: str, port: int | None, where: str = ""
) -> Iterator[RunningServer]:
    """Start a server on a port of this machine alone, and wait until it lists its models.

    Without a port a free one is taken, and another where that was lost to a neighbour. It ends with
    the context, and also with this process, however that ends. ParetronError(ENGINE): the port is
    in use, or the server ends or does not answer in time; then with the end of its log.
    """
    if port is not None and not _is_free(port):
        raise ParetronError(
            Problem(
                Code.ENGINE,
                f"port {port} is in use",
                where=where,
                fix="name another port, or none: then a free one is taken",
            )
        )
    with TemporaryDirectory(prefix="paretron-", ignore_cleanup_errors=True) as scratch:
        for left in reversed(range(TRIES)):
            taken = port or free_port()
            worker = _start(command, port=taken, scratch=Path(scratch))
            url = f"http://{HOST}:{taken}"
            try:
                try:
                    said = _asked(worker, None, name=name, url=url, timeout_s=START_TIMEOUT_S)
                except ParetronError:
                    if port or not left or _is_free(taken):
                        raise
                    continue
                log = Path(scratch) / "server.log"
                yield RunningServer(worker, name=name, url=url, models=said["models"], log=log)
                return
            finally:
                worker.end()


def stated_port(settings: EngineSettings) -> tuple[int | None, str]:
    """The port that a model's own settings state, if any, and where they do."""
    stated = next(iter(settings.ports.values()), None)
    return stated, f"profile.engines: {settings.name}: ports"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as asked:
        asked.bind((HOST, 0))
        return int(asked.getsockname()[1])


@contextmanager
def session_of(
    server: RunningServer, *, model: str, about: Mapping[str, str]
) -> Iterator[ServerSession]:
    """A session of a server of ours."""
    with load_client(server.url, model=model) as client:
        yield ServerSession(client, pid=server.pid, about=about, check_alive=server.check_alive)


def _start(command: Command, *, port: int, scratch: Path) -> Worker:
    # A server's own temporary files lie there too, so that they go with it.
    settings = {
        "command": list(command.on_port(port)),
        "scratch": str(scratch),
        "url": f"http://{HOST}:{port}",
        "grace_s": GRACE_S,
    }
    return Worker(
        [sys.executable, "-I", str(SUPERVISOR)],
        argument=json.dumps(settings),
        environment={**command.environment, "TMPDIR": str(scratch)},
        log=scratch / "server.log",
        grace_s=GRACE_S + ASK_TIMEOUT_S,
    )


def _is_free(port: int) -> bool:
    """Whether a server could have the port to itself."""
    with socket.socket() as asked:
        # Connections of a server that ended linger; they keep no other from listening.
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((HOST, port))
        except OSError:
            return False
    return True


def _asked(
    worker: Worker, request: object, *, name: str, url: str, timeout_s: float
) -> dict[str, Any]:
    try:
        return worker.ask(request, timeout_s=timeout_s)
    except WorkerFailed as failure:
        raise _stopped(name, str(failure), url) from failure


def _stopped(name: str, how: str, url: str) -> ParetronError:
    return ParetronError(
        Problem(
            Code.ENGINE,
            f"{name} {how}",
            where=url,
            fix="the log's end above names the reason; memory and the interpreter's packages are "
            "the usual ones",
        )
    )
