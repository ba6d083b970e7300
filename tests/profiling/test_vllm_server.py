"""The real vLLM behind its OpenAI server, started once: loads of every kind, a death in a load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from paretron.errors import Code, ParetronError
from paretron.recipe import Engine as EngineSettings
from paretron_profiling.engines.engine import Limits, Pace
from paretron_profiling.engines.vllm_server import ENGINE as VLLM
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.schema import CLOSED, OFFLINE, OPEN
from paretron_profiling.servers.server import ServerSession

INPUT_LEN, OUTPUT_LEN = 16, 12


def prompts(count: int, *, seed: str = "0") -> list[list[int]]:
    return random_prompts(
        batch=count, input_len=INPUT_LEN, vocab_size=320, avoid={0, 1, 2}, seed=seed
    )


def tree(session: ServerSession) -> list[psutil.Process]:
    """The supervisor and all below it."""
    root = psutil.Process(session.pid)
    return [root, *root.children(recursive=True)]


@pytest.fixture(scope="module")
def session(vllm_python: Path, teacher: ModelUnderTest) -> Iterator[ServerSession]:
    settings = EngineSettings(name="vllm_server", python=vllm_python)
    limits = Limits(batch=4, context_len=64, kv_bytes=4 * 64 * teacher.facts.kv_bytes_per_token)
    with ExitStack() as stack:
        opened = VLLM.open(teacher.folders["hf"], settings=settings, limits=limits)
        session = stack.enter_context(opened)
        processes = tree(session)
        yield session
        stack.close()
        assert [p for p in processes if p.is_running()] == []


@pytest.mark.parametrize("pace", [Pace(OFFLINE, 6, 0), Pace(CLOSED, 2, 0), Pace(OPEN, 40.0, 1)])
def test_every_load_is_answered_in_full(session: ServerSession, pace: Pace) -> None:
    sample = session.serve(prompts(6, seed=pace.mode), OUTPUT_LEN, pace=pace)
    assert (sample.completed, sample.failures) == (6, ())
    assert 6 <= len(sample.gaps_s) <= 6 * (OUTPUT_LEN - 1)  # a busy server bundles tokens
    rows = [*zip(sample.sent_s, sample.first_token_s, sample.finish_s, strict=True)]
    assert all(0 <= sent < first <= finish for sent, first, finish in rows)
    assert any(first < finish for _, first, finish in rows)
    if pace.mode != OPEN:
        waited = max(sample.sent_s) > min(sample.finish_s)
        assert waited == (pace.mode == CLOSED)


def test_what_it_runs_with(session: ServerSession) -> None:
    assert session.about["device"] == "cpu"
    assert session.about["dtype"] == "float32"
    assert session.about["mode"] == "eager, OpenAI server"
    assert session.about["vllm"][0].isdigit()


def test_too_long_a_prompt_is_told_as_the_server_tells_it(session: ServerSession) -> None:
    with pytest.raises(ParetronError, match=r"HTTP 400.*64") as caught:
        session.generate([list(range(10, 200))], OUTPUT_LEN)
    assert caught.value.problems[0].code is Code.ENGINE
    assert session.generate(prompts(2), 2).completed == 2


def test_e8_the_engine_killed_in_the_middle_of_a_load(session: ServerSession) -> None:
    """Last, because it ends the session: not the server that we started, but what it started."""
    processes = tree(session)
    engine = max(processes[2:], key=lambda p: p.memory_info().rss)

    def kill_soon() -> None:
        time.sleep(0.3)
        os.kill(engine.pid, signal.SIGKILL)

    threading.Thread(target=kill_soon).start()
    with pytest.raises(ParetronError) as caught:
        session.serve(prompts(2000), OUTPUT_LEN, pace=Pace(CLOSED, 4, 0))
        session.generate(prompts(1), 2)  # whoever was answered before stands
    assert caught.value.exit_code == 4
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []
    assert len(gone) == len(processes) >= 3
