"""A student with 16-bit weights behind the real vLLM's OpenAI server gives transformers' tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.served import compared


def test_a_served_student_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    python = os.environ.get("PARETRON_VLLM_PYTHON")
    if not python:
        pytest.skip("PARETRON_VLLM_PYTHON names no interpreter that has vLLM")
    found = compared("llama", "plain", tmp_path, python)
    assert found.get("served"), found
    assert found["smallest_lead"] > 1e-3, "choose another seed: a choice is a near tie"
    assert found["equal"], found
