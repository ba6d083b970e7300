"""Servers that we start: they answer, they go with all that came from them, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from paretron.errors import Code, ParetronError
from paretron.recipe import Engine as EngineSettings
from paretron.recipe import Profile
from paretron_profiling.engines import vllm_environment
from paretron_profiling.engines.engine import Limits, Pace, settings_for
from paretron_profiling.engines.openai_server import ENGINE as OPENAI
from paretron_profiling.engines.trtllm_server import ENGINE as TRTLLM
from paretron_profiling.engines.vllm_server import ENGINE as VLLM
from paretron_profiling.measure import profile_models
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.result import ProfileStopped
from paretron_profiling.schema import CLOSED
from paretron_profiling.servers import server as server_module
from paretron_profiling.servers.server import ServerSession, free_port
from profiling import sseserver as sse

LIMITS = Limits(batch=4, context_len=64, kv_bytes=1 << 20)
PROMPTS = [[100 + i, 5, 6, 7] for i in range(3)]
Plan = Callable[..., EngineSettings]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """Settings of vllm_server whose interpreter runs our server of a plan in vLLM's place."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(server_module, "GRACE_S", 2.0)

    def make(**plan: Any) -> EngineSettings:
        plan = {"first_s": 0.02, "gap_s": 0.002, "own_session": str(tmp_path / "pids")} | plan
        versions = json.dumps({"vllm": "0.32.0", "torch": "2.13.0+cpu"})
        python = tmp_path / "python"
        python.write_text(
            f"#!/bin/sh\ncase \"$2\" in -c) echo '{versions}'; exit 0;; esac\n"
            f"exec {sys.executable} {sse.__file__} --plan '{json.dumps(plan)}' \"$@\"\n"
        )
        python.chmod(0o755)
        return EngineSettings(name="vllm_server", python=python)

    yield make
    assert not list(scratch.iterdir())  # whatever happened, nothing of it lies about
    for pid in pids_of(tmp_path):
        assert not lives(pid)


def pids_of(folder: Path) -> list[int]:
    """The server, and its child that made a session of its own."""
    file = folder / "pids"
    return [int(pid) for pid in file.read_text().split()] if file.is_file() else []


def lives(pid: int) -> bool:
    """Whether a process runs; one that only waits to be taken leave of does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_gone(pid: int, *, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not lives(pid)


def can_bind(port: int) -> bool:
    with socket.socket() as asked:
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def opened(settings: EngineSettings, teacher: ModelUnderTest) -> Iterator[ServerSession]:
    with VLLM.open(teacher.folders["hf"], settings=settings, limits=LIMITS) as session:
        yield session


def stopped(settings: EngineSettings, teacher: ModelUnderTest) -> ParetronError:
    """The error that opening raises."""
    with pytest.raises(ParetronError) as caught, opened(settings, teacher):
        pass
    return caught.value


def test_it_answers_and_all_of_it_ends(
    planned: Plan, teacher: ModelUnderTest, tmp_path: Path
) -> None:
    port = free_port()
    settings = planned().model_copy(update={"ports": {"teacher": port}})
    with opened(settings, teacher) as session:
        server, child = pids_of(tmp_path)
        tree = {p.pid for p in psutil.Process(session.pid).children(recursive=True)}
        assert {server, child} <= tree
        assert not can_bind(port)
        sample = session.generate(PROMPTS, 4)
        assert (sample.completed, sample.failures, sample.tokens) == (3, (), ())
        loop = session.serve(PROMPTS, 4, pace=Pace(CLOSED, 2, 0))
        assert loop.completed == 3
        assert session.about["mode"] == "eager, OpenAI server"
        assert session.about["client_cpu"] != "0% of a core"
        arguments = psutil.Process(server).cmdline()
        assert "--no-enable-prefix-caching" in arguments
        assert arguments[arguments.index("--host") + 1] == "127.0.0.1"
        assert "--trust-remote-code" not in arguments
    assert can_bind(port)
    assert is_gone(session.pid or 0)


def test_one_that_does_not_listen_to_its_end_is_killed(
    planned: Plan, teacher: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    start = time.monotonic()
    with opened(planned(deaf=True), teacher):
        start = time.monotonic()
    assert time.monotonic() - start < 5


def test_e12_a_server_that_never_answers(
    planned: Plan, teacher: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "START_TIMEOUT_S", 1.0)
    monkeypatch.setattr(server_module, "GRACE_S", 0.2)
    error = stopped(planned(sleep=60), teacher)
    problem = error.problems[0]
    assert (problem.code, error.exit_code) == (Code.ENGINE, 4)
    assert "vllm_server gave no answer for 1 s" in problem.cause
    assert "| loading for ever" in problem.cause
    assert problem.fix


def test_e12_a_server_that_ends_at_its_start(planned: Plan, teacher: ModelUnderTest) -> None:
    error = stopped(planned(exit=7), teacher)
    assert error.exit_code == 4
    assert "vllm_server exited with 7" in error.problems[0].cause
    assert "| starting on port" in error.problems[0].cause


def test_e12_a_stated_port_that_is_in_use(planned: Plan, teacher: ModelUnderTest) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = stopped(planned().model_copy(update={"ports": {"teacher": port}}), teacher)
    problem = error.problems[0]
    assert (problem.code, error.exit_code) == (Code.ENGINE, 4)
    assert problem.cause == f"port {port} is in use"
    assert problem.where.endswith("ports")


def test_a_free_port_that_a_neighbour_takes_first(
    planned: Plan, teacher: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(server_module, "free_port", lambda: next(free))
        with opened(planned(), teacher) as session:
            assert session.generate(PROMPTS, 2).completed == 3


def test_e12_another_server_on_the_port(
    planned: Plan, teacher: ModelUnderTest, tmp_path: Path
) -> None:
    """vLLM lets another vLLM listen on its port: whose answers we get is told by the name."""
    settings = planned()
    python = tmp_path / "python"
    python.write_text(python.read_text().replace('"$@"', '"$@" --served-model-name other'))
    error = stopped(settings, teacher)
    assert "another server answers at http://127.0.0.1:" in error.problems[0].cause


def test_e8_a_server_killed_in_the_middle_of_a_load(planned: Plan, teacher: ModelUnderTest) -> None:
    asked = [*PROMPTS, [sse.DIES, 1, 2, 3]]
    with (
        pytest.raises(ParetronError) as caught,
        opened(planned(first_s=1.0), teacher) as session,
    ):
        session.generate(asked, 4)
    assert caught.value.exit_code == 4
    assert "vllm_server was killed by signal 9" in caught.value.problems[0].cause
    assert "| starting on port" in caught.value.problems[0].cause


def test_e8_the_result_of_a_killed_server_is_partial(
    planned: Plan, teacher: ModelUnderTest, tmp_path: Path
) -> None:
    def kill_in_round_one(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "profile.sample" and fields["round"] == 1:
            os.kill(pids_of(tmp_path)[0], signal.SIGKILL)

    engine = json.loads(planned().model_dump_json())
    profile = Profile.model_validate(
        {"engines": [engine], "batches": [2], "lengths": [[8, 4]], "repeats": 4}
    )
    with pytest.raises(ProfileStopped) as caught:
        profile_models([teacher], profile=profile, on_event=kill_in_round_one)
    assert caught.value.exit_code == 4
    assert caught.value.partial.incomplete == "vllm_server was killed by signal 9"
    assert [m.repeats for m in caught.value.partial.measurements["teacher"]] == [2]


PARETRON = """
import sys
from pathlib import Path
from paretron.recipe import Engine
from paretron_profiling.engines.engine import Limits
from paretron_profiling.engines.vllm_server import ENGINE
settings = Engine(name="vllm_server", python=Path(sys.argv[1]))
limits = Limits(batch=4, context_len=64, kv_bytes=1 << 20)
with ENGINE.open(Path(sys.argv[2]), settings=settings, limits=limits) as session:
    print(session.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("whom", ["paretron", "supervisor"])
def test_nothing_outlives_a_kill(
    whom: str, planned: Plan, teacher: ModelUnderTest, tmp_path: Path
) -> None:
    """Paretron, or the process that watches for it, killed where it stands."""
    command = [sys.executable, "-c", PARETRON, str(planned().python), str(teacher.folders["hf"])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as paretron:
        assert paretron.stdout is not None
        supervisor = int(paretron.stdout.readline())
        server, child = pids_of(tmp_path)
        tree = [p.pid for p in psutil.Process(paretron.pid).children(recursive=True)]
        assert {supervisor, server, child} <= set(tree)
        os.kill(paretron.pid if whom == "paretron" else supervisor, signal.SIGKILL)
        assert is_gone(server)
        if whom == "supervisor":
            os.kill(child, signal.SIGKILL)  # nobody is left who knows of a session of its own
    for pid in tree:
        assert is_gone(pid)
    deadline = time.monotonic() + 10
    while list((tmp_path / "scratch").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_server_that_runs_already(planned: Plan, teacher: ModelUnderTest) -> None:
    with opened(planned(longest=64), teacher) as running:
        url = running.url
        settings = EngineSettings(name="openai", servers={"teacher": f"{url}/v1"})
        assert OPENAI.check(settings) == []
        folder = teacher.folders["hf"]
        with OPENAI.open(folder, settings=settings, limits=LIMITS) as session:
            assert session.generate(PROMPTS, 4).completed == 3
            assert session.about["server"] == url
            assert session.pid is None
            assert "device" not in session.about
        longer = Limits(batch=1, context_len=65, kv_bytes=1)
        with (
            pytest.raises(ParetronError, match="takes 64 tokens a request, not 65"),
            OPENAI.open(folder, settings=settings, limits=longer),
        ):
            pass


def test_a_server_that_runs_no_more(teacher: ModelUnderTest) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    settings = EngineSettings(name="openai", servers={"teacher": url})
    with (
        pytest.raises(ParetronError) as caught,
        OPENAI.open(teacher.folders["hf"], settings=settings, limits=LIMITS),
    ):
        pass
    assert caught.value.exit_code == 4
    assert url in caught.value.problems[0].cause


def test_settings_of_one_model() -> None:
    settings = EngineSettings(
        name="openai", servers={"teacher": "http://a", "width": "http://b"}, ports={"width": 80}
    )
    mine = settings_for(settings, "width")
    assert (mine.servers, mine.ports) == ({"width": "http://b"}, {"width": 80})
    assert settings_for(settings, "teacher").ports == {}
    with pytest.raises(ParetronError, match="no server is named for the model depth") as caught:
        settings_for(settings, "depth")
    assert caught.value.problems[0].code is Code.RECIPE_VALUE


def test_what_openai_cannot_follow() -> None:
    python = Path("/bin/python")
    given = EngineSettings(name="openai", python=python, dtype="float32", ports={"teacher": 80})
    found = OPENAI.check(given)
    assert [p.where.rpartition(": ")[2] for p in found] == ["python", "dtype", "ports", "servers"]
    assert {p.code for p in found} == {Code.RECIPE_VALUE}


def test_what_keeps_trtllm_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = TRTLLM.check(EngineSettings(name="trtllm"))
    assert (problem.code.exit, problem.cause) == (6, "no trtllm-serve on the path")
    settings = EngineSettings(name="trtllm", python=tmp_path / "python")
    (problem,) = TRTLLM.check(settings)
    assert "beside" in problem.cause
    (tmp_path / "trtllm-serve").touch()
    (problem,) = TRTLLM.check(settings)
    assert problem.code.exit == 4
    (tmp_path / "nvidia-smi").touch(0o755)
    assert TRTLLM.check(settings) == []
    assert len(TRTLLM.check(settings.model_copy(update={"dtype": "float32"}))) == 1


def test_trtllm_serves_an_export_with_its_settings(
    tmp_path: Path, teacher: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own server in the command's place: what is started, with what, and what it refuses."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "nvidia-smi").touch(0o755)
    serve = tmp_path / "trtllm-serve"
    serve.write_text(f'#!/bin/sh\nexec {sys.executable} {sse.__file__} "$@"\n')
    serve.chmod(0o755)
    export = tmp_path / "export"
    export.mkdir()
    (export / "model").symlink_to(teacher.folders["hf"])
    config = export / "llm_config.yaml"
    config.write_text("max_batch_size: 4\nmax_seq_len: 64\n")
    settings = EngineSettings(name="trtllm", python=tmp_path / "python")
    with TRTLLM.open(export, settings=settings, limits=LIMITS) as session:
        assert session.generate(PROMPTS, 4).completed == 3
        (server,) = psutil.Process(session.pid).children()
        arguments = server.cmdline()[2:]
    assert arguments[0] == str(teacher.folders["hf"].resolve())
    assert arguments[-2:] == ["--config", str(config)]
    config.write_text("max_batch_size: 3\n")
    with (
        pytest.raises(ParetronError) as caught,
        TRTLLM.open(export, settings=settings, limits=LIMITS),
    ):
        pass
    assert [p.cause for p in caught.value.problems] == [
        "the export was made for max_batch_size 3, not 4",
        "the export was made for max_seq_len None, not 64",
    ]


def test_vllm_is_told_what_a_device_can_do(teacher: ModelUnderTest) -> None:
    assert vllm_environment.Found("0.32.0", "2.13.0+cpu").is_for_cpu
    assert not vllm_environment.Found("0.32.0", "2.13.0").is_for_cpu
    few = Limits(batch=1, context_len=100, kv_bytes=1)
    many = Limits(batch=1, context_len=100, kv_bytes=100 << 20)
    assert vllm_environment.kv_cache_bytes(few) == vllm_environment.MIN_KV_BYTES
    assert vllm_environment.kv_cache_bytes(many) == 2 * 128 << 20
