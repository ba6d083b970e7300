"""The real vLLM, on the CPU, loads what the hf exporter writes and gives transformers' tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretron_exporters.hf import EXPORTER
from paretron_exporters.transformers_engine import TransformersEngine
from vllmserver import answer

PicoMaker = Callable[..., Path]
RunExport = Callable[..., Any]

STEPS = 20
PROMPTS = [[5, 6, 7, 8], [300, 17, 4, 90, 23, 11, 250], list(range(40, 90))]
# heads * head_dim is 128 in all of them, the hidden size is not.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "mistral": ("mistral", {}),
    # What a Llama becomes that its own class refuses: hidden is no multiple of the heads.
    "relabelled": ("mistral", {
        "hidden_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {}),
    "nemotron": ("nemotron", {"seed": 1}),
    # Its kernel on a CPU takes hidden sizes that are multiples of 32.
    "mixtral": ("mixtral", {"seed": 3}),
    "qwen3_moe": ("qwen3_moe", {"seed": 3}),
}  # fmt: skip


def greedy_by_transformers(folder: Path) -> list[list[int]]:
    """Greedy tokens, after making sure that no choice among them was a near tie."""
    engine, found = TransformersEngine(folder), []
    for prompt in PROMPTS:
        session, tokens = engine.start(), []
        logits = session.feed(prompt)[-1]
        for _ in range(STEPS):
            second, first = np.sort(logits)[-2:]
            assert first - second > 1e-3, "choose another seed: this choice is a near tie"
            tokens.append(int(logits.argmax()))
            logits = session.feed(tokens[-1:])[-1]
        found.append(tokens)
    return found


def test_vllm_gives_the_same_greedy_tokens(
    pico: PicoMaker, run_export: RunExport, tmp_path: Path
) -> None:
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    expected = {}
    for name, (family, config) in STUDENTS.items():
        out = tmp_path / f"{name}-hf"
        run_export(EXPORTER, pico(family, name=name, **config), out)
        expected[str(out)] = greedy_by_transformers(out)
    found = answer(
        python,
        Path(__file__).with_name("vllm_greedy_worker.py"),
        {"models": list(expected), "prompts": PROMPTS, "steps": STEPS},
        folder=tmp_path,
    )
    assert found == expected
