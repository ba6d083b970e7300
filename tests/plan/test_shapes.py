"""Targets that a config class refuses are told at plan time, with the nearest that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from paretron.errors import Code
from paretron.families import explicit, family_of, sizes
from paretron.plan.shapes import target_problems
from paretron.recipe import Student
from paretron.run.check import twin_config

BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 96,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "sliding_window": 8,
}  # fmt: skip
LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def _problems(config: dict[str, Any], **target: int) -> list[tuple[str, str]]:
    family = family_of(config)
    said = explicit(family, config)
    found = target_problems(
        "s", sizes(family, said), Student.model_validate(target), family=family, config=said
    )
    assert all(p.code is Code.RECIPE_TARGET for p in found)
    return [(p.where, p.fix) for p in found]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_wants_a_hidden_size_that_its_heads_divide(family: str) -> None:
    config = {"model_type": family, **BASE}
    assert _problems(config, hidden=100) == [("students.s.hidden", "nearest: 96 or 104")]
    assert _problems(config, hidden=100, heads=4, layers=2) == []
    assert _problems(config, hidden=104) == []


def test_long_contexts_want_heads_times_head_dim() -> None:
    config = {"model_type": "phi3", **BASE, "rope_scaling": LONG}
    assert _problems(config, hidden=160) == [("students.s.hidden", "nearest: 256")]
    assert _problems(config, heads=4) == [("students.s.hidden", "nearest: 128")]
    assert _problems(config, hidden=128, heads=4, ffn=64, layers=2) == []
    assert _problems({**config, "rope_scaling": None}, hidden=160) == []


@pytest.mark.parametrize("family", ["olmo2", "granite", "starcoder2", "llama"])
def test_others_take_any_width(family: str) -> None:
    assert _problems({"model_type": family, **BASE}, hidden=100) == []


def test_the_twin_of_a_long_context_is_a_shape_that_its_class_takes() -> None:
    config = explicit(
        family_of({"model_type": "phi3"}), {"model_type": "phi3", **BASE, "rope_scaling": LONG}
    )
    assert _problems(twin_config(config), ffn=32, hidden=112) == []
