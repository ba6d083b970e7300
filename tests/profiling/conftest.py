"""Three pico models with their ONNX exports, made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paretron_profiling.models import ModelFacts, ModelUnderTest
from pico import make_pico

SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {},
    "width": {"hidden_size": 48, "intermediate_size": 64},
    "depth": {"num_hidden_layers": 2},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other crawl when other tests share the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for child processes
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter that has vLLM; `make test` names it."""
    named = os.environ.get("PARETRON_VLLM_PYTHON")
    if not named:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    return Path(named)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[ModelUnderTest]:
    """A teacher, a width student and a depth student, as checkpoints and as ONNX."""
    root = tmp_path_factory.mktemp("models")
    made = []
    for name, config in SHAPES.items():
        folder = make_pico(root / name, "llama", **config)
        onnx = _export_onnx(folder, root / f"{name}-onnx")
        made.append(ModelUnderTest(name, name, {"hf": folder, "onnx": onnx}, ModelFacts.of(folder)))
    return made


@pytest.fixture(scope="session")
def teacher(models: list[ModelUnderTest]) -> ModelUnderTest:
    return models[0]


def _export_onnx(source: Path, target: Path) -> Path:
    """What onnxruntime-genai's own builder writes, without Paretron's exporter in between."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    cache = str(target.parent / "cache")
    options = parse_extra_options(None, str(source), str(target), "fp32", "cpu", cache, [])
    create_model(None, str(source), str(target), "fp32", "cpu", cache, **options)
    return target
