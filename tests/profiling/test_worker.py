"""A child process that answers, fails, hangs, or loses its parent: it never stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paretron.errors import Code, ParetronError
from paretron.recipe import Engine as EngineSettings
from paretron_profiling.engines import vllm_offline
from paretron_profiling.engines.engine import Limits
from paretron_profiling.engines.vllm_offline import ENGINE as VLLM
from paretron_profiling.engines.worker import Worker, WorkerFailed

VERSIONS = '{"vllm": "%s", "torch": "2.13.0+cpu"}'  # what an interpreter says it has
ECHO = """
import json, os, subprocess, sys
answers = os.fdopen(int(sys.argv[1]), "w")
say = lambda text: (answers.write(text + "\\n"), answers.flush())
print("started with", sys.argv[2], flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request == "child":
        say(json.dumps({"pid": subprocess.Popen(["sleep", "60"]).pid}))
    elif request == "exit":
        print("going", flush=True)
        sys.exit(3)
    elif request == "nonsense":
        say("not json")
    elif request == "silence":
        continue
    else:
        print("noise on standard output", flush=True)
        say(json.dumps({"echo": request}))
"""


@contextmanager
def started(tmp_path: Path, source: str = ECHO) -> Iterator[Worker]:
    script = tmp_path / "worker.py"
    script.write_text(source)
    worker = Worker(
        [sys.executable, "-I", str(script)],
        argument="hello",
        environment=dict(os.environ),
        log=tmp_path / "log",
    )
    try:
        yield worker
    finally:
        worker.end()


def is_gone(pid: int, *, within_s: float = 10) -> bool:
    """Whether a process has ended (a zombie has), or ends within a time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_answers_in_order(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        for request in ([1, 2], "ä\n", {"a": None}, list(range(100_000))):
            assert worker.ask(request, timeout_s=30) == {"echo": request}
    assert is_gone(worker.pid)


def test_an_exit_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        with pytest.raises(WorkerFailed, match="exited with 3") as caught:
            worker.ask("exit", timeout_s=30)
        assert "| started with hello" in str(caught.value)
        assert "| going" in str(caught.value)
        with pytest.raises(WorkerFailed, match="exited with 3"):
            worker.ask("again", timeout_s=30)


def test_a_kill_is_told(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        worker.ask("up", timeout_s=30)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="killed by signal 9"):
            worker.ask("hello", timeout_s=30)


def test_silence_and_nonsense(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        worker.ask("up", timeout_s=30)
        with pytest.raises(WorkerFailed, match="no answer"):
            worker.ask("silence", timeout_s=0.2)
        with pytest.raises(WorkerFailed, match="not json"):
            worker.ask("nonsense", timeout_s=30)


def test_its_children_end_with_it(tmp_path: Path) -> None:
    with started(tmp_path) as worker:
        child = worker.ask("child", timeout_s=30)["pid"]
        assert not is_gone(child, within_s=0.1)
    assert is_gone(child)
    assert is_gone(worker.pid)


def test_one_that_ignores_its_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paretron_profiling.engines.worker.GRACE_S", 0.2)
    with started(tmp_path, "import time\ntime.sleep(60)\n") as worker:
        pass
    assert is_gone(worker.pid, within_s=0.1)


def test_the_vllm_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """In the middle of a computation, because only its reading thread sees the input close."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "log").write_text("the parent would remove it")
    code = (
        "import queue, runpy, sys, threading, time\n"
        f"read = runpy.run_path({str(vllm_offline.WORKER)!r})['read_requests']\n"
        f"given = (queue.Queue(), {str(scratch)!r})\n"
        "threading.Thread(target=read, args=given, daemon=True).start()\n"
        "print('up', flush=True)\n"
        "deadline = time.monotonic() + 60\n"
        "while time.monotonic() < deadline: pass\n"
    )
    parent_code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {code!r}], stdin=subprocess.PIPE,\n"
        "    start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [parent.stdout.readline().decode().strip() for _ in range(2)]
    worker = int(next(line for line in pids if line != "up"))
    assert not is_gone(worker, within_s=0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert is_gone(worker)
    assert not scratch.exists()


def test_an_engine_that_never_gets_healthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pico: Callable[..., Path]
) -> None:
    """An interpreter that says it has vLLM, prints to its log, and then hangs or exits."""
    folder = pico()
    fake = tmp_path / "python"
    monkeypatch.setattr(vllm_offline, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr("paretron_profiling.engines.worker.GRACE_S", 0.2)
    for ending, said in (("exec sleep 60", "no answer for"), ("exit 7", "exited with 7")):
        fake.write_text(
            f"#!/bin/sh\ncase $2 in -c) echo '{VERSIONS % '0.32.0'}'; exit 0;; esac\n"
            f"echo address already in use\necho $$ > {tmp_path}/pid\n{ending}\n"
        )
        fake.chmod(0o755)
        settings = EngineSettings(name="vllm", python=fake)
        limits = Limits(batch=1, context_len=8, kv_bytes=1)
        with (
            pytest.raises(ParetronError) as caught,
            VLLM.open(folder, settings=settings, limits=limits),
        ):
            pass
        problem = caught.value.problems[0]
        assert (problem.code, caught.value.exit_code) == (Code.ENGINE, 4)
        assert said in problem.cause
        assert "| address already in use" in problem.cause
        assert is_gone(int((tmp_path / "pid").read_text()))


def test_an_old_vllm(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{VERSIONS % '0.17.3'}'\n")
    fake.chmod(0o755)
    (problem,) = VLLM.check(EngineSettings(name="vllm", python=fake))
    assert (problem.code, problem.code.exit) == (Code.OPTIONAL_OLD, 6)


def test_no_secret_reaches_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("OPENAI_API_KEY", "hf_canary")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    environment = vllm_offline._environment()
    assert "hf_canary" not in environment.values()
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert vllm_offline._environment()["OMP_WAIT_POLICY"] == "ACTIVE"
