"""What compensating costs by arithmetic: an 8B model's shape, within 3 GB."""

from __future__ import annotations

from typing import Any

import pytest

from paretron.compensate.decide import decide
from paretron.families import FAMILIES
from paretron.plan.compensation import Compensation, compensation_cost
from paretron.plan.cost import ModelFacts, model_facts
from paretron.plan.hardware import Hardware
from paretron.recipe import Recipe

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TEACHER = model_facts(CONFIG, dtype="BF16")
WIDTH = model_facts(CONFIG | {"hidden_size": 3072, "intermediate_size": 9216}, dtype="BF16")
DEPTH = model_facts(CONFIG | {"num_hidden_layers": 16}, dtype="BF16")


def _recipe(**compensate: Any) -> Recipe:
    texts = {name: {"path": f"{name}.jsonl"} for name in ("calibration", "train", "validation")}
    return Recipe.model_validate(
        {
            "schema": 1,
            "teacher": {"model": "teacher"},
            "data": texts,
            "students": {"small": {"layers": 16}},
            "distill": {"tokens": 1000, "lr": 1e-4},
            "compensate": compensate,
        }
    )


def _cost(student: ModelFacts, **compensate: Any) -> Compensation:
    recipe = _recipe(**compensate)
    decision = decide(FAMILIES["llama"], CONFIG, sizes=TEACHER.sizes, new=student.sizes,
                      settings=recipe.compensate)  # fmt: skip
    return compensation_cost(recipe, TEACHER, student, decision)


def test_an_8b_teacher_is_compensated_within_3_gb_of_weights_and_moments() -> None:
    for student in (WIDTH, DEPTH):
        assert 1e9 < _cost(student).memory_bytes < 3e9
    # Second moments of an MLP of 14336, whole and copied once, would be 3.3 GB by themselves.
    assert _cost(DEPTH).memory_bytes > 14336**2 * 8 // 2


def test_each_part_costs_something_and_trimming_nothing() -> None:
    trimmed = _cost(WIDTH, rotate=False, refit=False)
    rotated = _cost(WIDTH, refit=False)
    both = _cost(WIDTH)
    assert (trimmed.flops, trimmed.memory_bytes) == (0, 0)
    assert 0 < rotated.flops < both.flops
    data = _recipe().data.calibration
    passed = TEACHER.forward_flops(
        tokens=min(data.samples, _recipe().compensate.samples) * data.seq_len,
        seq_len=data.seq_len,
    )
    assert 2 * passed < both.flops < 8 * passed


def test_an_axis_measured_alone_costs_as_much_again() -> None:
    assert _cost(WIDTH, by_axis=True).flops == 3 * _cost(WIDTH).flops


def test_means_take_less_than_regressions() -> None:
    assert 0 < _cost(WIDTH, refit="mean").flops < _cost(WIDTH).flops


def test_what_is_not_compensated_costs_nothing() -> None:
    recipe = _recipe()
    config = CONFIG | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
    teacher, student = (
        model_facts(config | {"intermediate_size": n}, dtype="BF16") for n in (14336, 9216)
    )
    decision = decide(FAMILIES["olmo2"], config, sizes=teacher.sizes, new=student.sizes,
                      settings=recipe.compensate)  # fmt: skip
    assert compensation_cost(recipe, teacher, student, decision) == Compensation()


@pytest.mark.parametrize("what", ["GB of memory", "min on one machine", "compensate: {rotate"])
def test_the_note_says_what_it_takes_and_how_to_do_without(what: str) -> None:
    hardware = Hardware("one machine", 1e12, 8 << 30, "by hand", is_gpu=False)
    assert what in _cost(WIDTH).note(hardware)
