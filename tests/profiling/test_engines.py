"""The engines in this process, for real: exact tokens, whole answers, honest refusals."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from paretron.artifacts.models import load_model
from paretron.errors import Code, ParetronError
from paretron.plugins import ENGINES, find_plugin
from paretron.recipe import Engine as EngineSettings
from paretron.versions import release
from paretron_profiling.engines.engine import Engine, Limits, Session, compute_dtype
from paretron_profiling.engines.openai_server import ENGINE as OPENAI
from paretron_profiling.engines.ortgenai import ENGINE as ORTGENAI
from paretron_profiling.engines.transformers_eager import ENGINE as TRANSFORMERS
from paretron_profiling.engines.trtllm_server import ENGINE as TRTLLM
from paretron_profiling.engines.vllm_offline import ENGINE as VLLM
from paretron_profiling.engines.vllm_server import ENGINE as VLLM_SERVER
from paretron_profiling.models import ModelUnderTest
from paretron_profiling.prompts import random_prompts

LIMITS = Limits(batch=4, context_len=64, kv_bytes=1 << 20)
IN_PROCESS = [ORTGENAI, TRANSFORMERS]
named = pytest.mark.parametrize("engine", IN_PROCESS, ids=lambda e: e.name)


def greedy(model_dir: Path, prompt: list[int], output_len: int) -> list[int]:
    """Without any cache: the whole sequence anew for every token."""
    model, ids = load_model(model_dir), list(prompt)
    with torch.inference_mode():
        for _ in range(output_len):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@named
def test_tokens_are_the_greedy_ones(engine: Engine, models: list[ModelUnderTest]) -> None:
    for model in models:
        prompts = random_prompts(batch=3, input_len=9, vocab_size=320, avoid={0, 1, 2}, seed="0")
        settings = EngineSettings(name=engine.name)
        with engine.open(model.folders[engine.wants], settings=settings, limits=LIMITS) as session:
            sample = session.generate(prompts, 12)
        expected = [greedy(model.folders["hf"], p, 12) for p in prompts]
        assert all(1 not in e for e in expected), "a prompt whose answer holds end of sequence"
        assert [list(t) for t in sample.tokens] == expected


@named
def test_times_are_whole_and_in_order(engine: Engine, teacher: ModelUnderTest) -> None:
    prompts = random_prompts(batch=2, input_len=8, vocab_size=320, avoid={0, 1, 2}, seed="0")
    with _open(engine, teacher) as session:
        sample = session.generate(prompts, 5)
        about = dict(session.about)
    assert len(sample.gaps_s) == 4
    assert all(s > 0 for s in sample.gaps_s)
    assert sample.prefill_s + sum(sample.gaps_s) == pytest.approx(sample.total_s)
    assert about["device"] == "cpu"


@named
def test_an_end_of_sequence_ends_nothing(
    engine: Engine, tmp_path: Path, models: list[ModelUnderTest]
) -> None:
    """The model would stop at once: its end of sequence is what it always says first."""
    model = models[0]
    prompt = random_prompts(batch=1, input_len=8, vocab_size=320, avoid={0, 1, 2}, seed="0")
    first = greedy(model.folders["hf"], prompt[0], 1)[0]
    folder = _with_eos(model.folders[engine.wants], tmp_path / "model", first)
    settings = EngineSettings(name=engine.name)
    with engine.open(folder, settings=settings, limits=LIMITS) as session:
        sample = session.generate(prompt, 6)
    assert len(sample.tokens[0]) == 6


def _with_eos(source: Path, target: Path, token: int) -> Path:
    """A copy of a model folder whose configs name another end of sequence."""
    shutil.copytree(source, target)
    for name in ("config.json", "generation_config.json", "genai_config.json"):
        if (target / name).is_file():
            config = json.loads((target / name).read_text())
            config.get("model", config)["eos_token_id"] = token
            (target / name).write_text(json.dumps(config))
    return target


def _open(engine: Engine, model: ModelUnderTest) -> AbstractContextManager[Session]:
    settings = EngineSettings(name=engine.name)
    return engine.open(model.folders[engine.wants], settings=settings, limits=LIMITS)


def test_bfloat16_on_request(teacher: ModelUnderTest) -> None:
    settings = EngineSettings(name="transformers", dtype="bfloat16")
    with TRANSFORMERS.open(teacher.folders["hf"], settings=settings, limits=LIMITS) as session:
        assert session.about["dtype"] == "bfloat16"
    assert compute_dtype(teacher.folders["hf"], settings=EngineSettings(name="x")) == "float32"


def test_a_broken_onnx_model_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    settings = EngineSettings(name="ortgenai")
    with (
        pytest.raises(ParetronError) as caught,
        ORTGENAI.open(tmp_path, settings=settings, limits=LIMITS),
    ):
        pass
    assert caught.value.problems[0].code is Code.ENGINE
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.problems[0].cause


def test_too_long_a_workload_is_an_engine_error(teacher: ModelUnderTest) -> None:
    prompts = random_prompts(batch=1, input_len=600, vocab_size=320, avoid={0, 1, 2}, seed="0")
    with _open(ORTGENAI, teacher) as session, pytest.raises(ParetronError) as caught:
        session.generate(prompts, 4)
    assert caught.value.problems[0].code is Code.ENGINE


@named
def test_nothing_to_complain_about(engine: Engine) -> None:
    assert engine.check(EngineSettings(name=engine.name)) == []


@pytest.mark.parametrize(
    ("engine", "distribution", "install"),
    [
        (ORTGENAI, "onnxruntime-genai", 'pip install "paretron[onnx]"'),
        (TRANSFORMERS, "transformers", "pip install --upgrade paretron"),
    ],
    ids=["ortgenai", "transformers"],
)
def test_missing_and_old_packages(
    engine: Engine, distribution: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    (problem,) = engine.check(EngineSettings(name=engine.name))
    assert (problem.code, problem.code.exit) == (Code.OPTIONAL_MISSING, 6)
    assert problem.fix == install
    assert distribution in problem.cause

    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.9")
    (problem,) = engine.check(EngineSettings(name=engine.name))
    assert (problem.code, problem.code.exit) == (Code.OPTIONAL_OLD, 6)
    assert "0.1.9" in problem.cause


def test_settings_that_an_engine_cannot_follow() -> None:
    python = Path(sys.executable)
    found = ORTGENAI.check(EngineSettings(name="ortgenai", python=python, dtype="bfloat16"))
    assert [p.code for p in found] == [Code.RECIPE_VALUE] * 2
    found = TRANSFORMERS.check(EngineSettings(name="transformers", python=python))
    assert [p.code for p in found] == [Code.RECIPE_VALUE]


@pytest.mark.parametrize(
    ("python", "cause"),
    [
        (None, "needs an interpreter"),
        (Path("/no/such/python"), "not a Python interpreter"),
        (Path("/bin/false"), "not a Python interpreter"),
        (Path(sys.executable), "has no vllm"),
    ],
)
def test_vllm_needs_an_interpreter_that_has_it(python: Path | None, cause: str) -> None:
    (problem,) = VLLM.check(EngineSettings(name="vllm", python=python))
    assert problem.code is Code.RECIPE_VALUE
    assert cause in problem.cause
    assert problem.where.endswith("python")


def test_engines_by_name() -> None:
    names = ("openai", "ortgenai", "transformers", "trtllm", "vllm", "vllm_server")
    found = [find_plugin(ENGINES, name, where="engine") for name in names]
    assert found == [OPENAI, ORTGENAI, TRANSFORMERS, TRTLLM, VLLM, VLLM_SERVER]
    assert [e.name for e in found] == list(names)
    with pytest.raises(ParetronError, match="ortgenai") as caught:
        find_plugin(ENGINES, "ortgen", where="engine")
    assert caught.value.problems[0].code is Code.RECIPE_VALUE


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.32.0+cpu", (0, 32, 0)), ("5.3", (5, 3)), ("1.2rc1", (1,)), ("dev", ())],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
