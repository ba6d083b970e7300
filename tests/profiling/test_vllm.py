"""The real vLLM, started once: the same tokens as transformers, whole samples, a death in a run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from paretron.artifacts.models import load_model
from paretron.errors import Code
from paretron.recipe import Engine as EngineSettings
from paretron.recipe import Profile
from paretron_profiling import measure
from paretron_profiling.engines.engine import Limits
from paretron_profiling.engines.vllm_offline import ENGINE as VLLM
from paretron_profiling.engines.vllm_offline import VllmSession
from paretron_profiling.measure import profile_models
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.result import ProfileStopped
from paretron_profiling.schema import OFFLINE

OUTPUT_LEN = 20


@pytest.fixture(scope="module")
def session(vllm_python: Path, teacher: ModelUnderTest) -> Iterator[VllmSession]:
    settings = EngineSettings(name="vllm", python=vllm_python)
    assert VLLM.check(settings) == []
    limits = Limits(batch=4, context_len=64, kv_bytes=4 * 64 * teacher.facts.kv_bytes_per_token)
    with VLLM.open(teacher.folders["hf"], settings=settings, limits=limits) as opened:
        yield opened


def test_greedy_tokens_equal_transformers(session: VllmSession, teacher: ModelUnderTest) -> None:
    prompts = random_prompts(batch=4, input_len=12, vocab_size=320, avoid={0, 1, 2}, seed="0")
    sample = session.generate(prompts, OUTPUT_LEN)
    model, ids = load_model(teacher.folders["hf"]), torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(OUTPUT_LEN):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert [list(t) for t in sample.tokens] == ids[:, 12:].tolist()


def test_times_belong_to_requests(session: VllmSession) -> None:
    prompts = random_prompts(batch=3, input_len=16, vocab_size=320, avoid={0, 1, 2}, seed="1")
    sample = session.generate(prompts, 8)
    assert len(sample.first_token_s) == len(sample.finish_s) == 3
    assert all(0 < a < b for a, b in zip(sample.first_token_s, sample.finish_s, strict=True))
    assert len(sample.gaps_s) >= 7
    assert min(sample.first_token_s) + sum(sample.gaps_s) == pytest.approx(sample.total_s)
    assert all(len(t) == 8 for t in sample.tokens)


def test_what_it_runs_with(session: VllmSession) -> None:
    assert session.about["dtype"] == "float32"
    assert session.about["device"] == "cpu"
    assert int(session.about["threads"]) >= 1
    assert os.getpgid(session.pid) == session.pid != os.getpgrp()


def test_e8_killed_in_the_middle_of_a_run(
    session: VllmSession, teacher: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last, because it ends the session: partial result, exit 4, the log's end, no process left."""

    class Opened:
        name, wants, session_bytes, largest_batch = "vllm", "hf", 0, None
        modes = frozenset({OFFLINE})

        def check(self, settings: object) -> list[object]:
            return []

        @contextmanager
        def open(self, model_dir: Path, **settings: object) -> Iterator[VllmSession]:
            yield session

    def kill_in_round_one(kind: str, fields: Mapping[str, object]) -> None:
        if kind == "profile.sample" and fields["round"] == 1:
            os.killpg(session.pid, signal.SIGKILL)

    monkeypatch.setattr(measure, "find_plugin", lambda group, name, *, where: Opened())
    profile = Profile.model_validate(
        {"engines": [{"name": "vllm"}], "batches": [2], "lengths": [[8, 4]], "repeats": 4}
    )
    with pytest.raises(ProfileStopped) as caught:
        profile_models([teacher], profile=profile, on_event=kill_in_round_one)
    problem = caught.value.problems[0]
    assert (problem.code, caught.value.exit_code) == (Code.ENGINE, 4)
    assert "killed by signal 9" in problem.cause
    assert "\n    | " in problem.cause
    partial = caught.value.partial
    assert partial.incomplete == "vllm was killed by signal 9"
    assert [m.repeats for m in partial.measurements["teacher"]] == [2]
    with pytest.raises(ProcessLookupError):
        os.killpg(session.pid, 0)
