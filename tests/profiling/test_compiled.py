"""Transformers with a static cache and a compiled decode step: the same tokens, other times."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from paretron.errors import Code, ParetronError
from paretron.recipe import Engine as EngineSettings
from paretron_profiling.engines.engine import Engine, Limits
from paretron_profiling.engines.transformers_compiled import ENGINE as COMPILED
from paretron_profiling.engines.transformers_eager import ENGINE as EAGER
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts
from paretron_profiling.schema import Sample
from pico import make_pico

LIMITS = Limits(batch=4, context_len=64, kv_bytes=1 << 20)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are traced and checked as any, but not translated for the processor."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def prompts(batch: int, input_len: int = 9) -> list[list[int]]:
    found = random_prompts(
        batch=batch, input_len=input_len, vocab_size=320, avoid={0, 1, 2}, seed="0"
    )
    return [list(prompt) for prompt in found]


def answers(engine: Engine, folder: Path, asked: Sequence[tuple[int, int]]) -> list[Sample]:
    """What an engine says to so many prompts, for each (batch, output_len)."""
    settings = EngineSettings(name=engine.name)
    with engine.open(folder, settings=settings, limits=LIMITS) as session:
        return [session.generate(prompts(batch), output_len) for batch, output_len in asked]


def test_tokens_are_those_of_eager_and_compiling_is_not_measured(
    models: list[ModelUnderTest],
) -> None:
    folder = models[2].folders["hf"]
    settings = EngineSettings(name=COMPILED.name)
    with COMPILED.open(folder, settings=settings, limits=LIMITS) as session:
        started = time.perf_counter()
        first = session.generate(prompts(3), 12)
        whole_s = time.perf_counter() - started
        again = session.generate(prompts(3), 12)
        about = dict(session.about)
    (eager,) = answers(EAGER, folder, [(3, 12)])
    assert first.tokens == again.tokens == eager.tokens
    assert first.total_s < whole_s / 3
    assert len(first.gaps_s) == 11
    assert all(gap > 0 for gap in first.gaps_s)
    assert about["device"] == "cpu"
    assert about["mode"] == "static cache, compiled decode step, prefill not compiled"


@pytest.mark.usefixtures("traced")
def test_windows_and_every_batch_and_length(tmp_path: Path) -> None:
    """The prompt fills the window (8), the answer leaves it; the cache is used again after each.

    A compiler that takes one program of a function is asked for four.
    """
    folder = make_pico(tmp_path / "model", "gemma3_text", num_hidden_layers=2)
    asked = [(2, 12), (1, 12), (2, 3), (2, 12), (1, 2)]
    with torch._dynamo.config.patch(recompile_limit=1):
        own = answers(COMPILED, folder, asked)
    eager = answers(EAGER, folder, asked)
    assert [s.tokens for s in own] == [s.tokens for s in eager]


def test_what_cannot_be_compiled_is_an_engine_error(models: list[ModelUnderTest]) -> None:
    broken = torch._inductor.config.patch(
        {"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}
    )
    with broken, pytest.raises(ParetronError, match="cannot be compiled") as caught:
        answers(COMPILED, models[2].folders["hf"], [(1, 3)])
    (problem,) = caught.value.problems
    assert problem.code is Code.ENGINE
    assert "\n" not in problem.cause


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EngineSettings(name=COMPILED.name)
    assert COMPILED.check(settings) == []
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (problem,) = COMPILED.check(settings)
    assert (problem.code, problem.code.exit) == (Code.OPTIONAL_MISSING, 6)
