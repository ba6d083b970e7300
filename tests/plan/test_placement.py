"""What a distillation's teacher takes on each device, by where its layers are."""

from __future__ import annotations

from typing import Any

import pytest

from paretron.plan.cost import model_facts
from paretron.plan.estimate import estimate_stages
from paretron.plan.hardware import Hardware
from paretron.plan.stages import stages_of
from paretron.recipe import Recipe
from pico import pico_model
from picorun import RECIPE

GPU = Hardware("a GPU", 1e14, 80 << 30, "stated", is_gpu=True)


@pytest.mark.parametrize(
    ("placement", "of_layers"), [("replicated", 1.0), ("sharded", 0.5), ("offloaded", 0.25)]
)
def test_only_the_layers_of_a_teacher_are_shared_or_away(placement: str, of_layers: float) -> None:
    facts = model_facts(pico_model("llama").config.to_dict(), dtype="F32")  # of four layers

    def needed(**changes: Any) -> int:
        distill = RECIPE["distill"] | {"processes": 2} | changes
        recipe = Recipe.model_validate(RECIPE | {"distill": distill})
        stages = stages_of(recipe, block_sizes=(), engine_formats=frozenset())
        students = {"width": facts, "depth": facts}
        found = estimate_stages(
            stages,
            recipe,
            facts,
            students,
            GPU,
            candidates={},
            corrected_weights=0,
            compensations={},
        )
        return found["width.distill"].memory_bytes

    student = 16 * facts.params // 2
    embeddings = 4 * (facts.params - facts.non_embedding_params)
    teacher = embeddings + int(of_layers * 4 * facts.non_embedding_params)
    assert abs(needed(teacher=placement) - student - teacher) <= 4


CPU = Hardware("a CPU", 1e11, 8 << 30, "stated", is_gpu=False)


@pytest.mark.parametrize(
    ("score", "hardware", "bytes_a_param"),
    [
        ({"placement": "resident"}, GPU, 2),
        ({"placement": "resident"}, CPU, 4),
        ({"placement": "resident", "processes": 2}, CPU, 8),
        ({"criterion": "taylor"}, GPU, 6),
        ({"criterion": "taylor"}, CPU, 8),
        ({"depth": {"metric": "taylor"}}, CPU, 8),
    ],
)
def test_scoring_as_a_whole_takes_weights_and_gradients(
    score: dict[str, Any], hardware: Hardware, bytes_a_param: int
) -> None:
    facts = model_facts(pico_model("llama").config.to_dict(), dtype="BF16")
    assert _scoring_bytes(score, hardware) == bytes_a_param * facts.params


def test_scoring_layer_by_layer_takes_less() -> None:
    facts = model_facts(pico_model("llama").config.to_dict(), dtype="BF16")
    for placement in ("auto", "streamed"):
        assert _scoring_bytes({"placement": placement}, CPU) < 2 * facts.params


def _scoring_bytes(score: dict[str, Any], hardware: Hardware) -> int:
    facts = model_facts(pico_model("llama").config.to_dict(), dtype="BF16")
    recipe = Recipe.model_validate(RECIPE | {"score": score})
    stages = stages_of(recipe, block_sizes=(), engine_formats=frozenset())
    found = estimate_stages(
        stages, recipe, facts, {"width": facts, "depth": facts}, hardware, candidates={},
        corrected_weights=0, compensations={},
    )  # fmt: skip
    return found["score"].memory_bytes
