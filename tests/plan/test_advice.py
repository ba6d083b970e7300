"""Sizes that a user would regret: what is said, what is nearest, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretron.artifacts.serving import served_by, tensor_parallel_degrees
from paretron.errors import Code
from paretron.families import FAMILIES, family_of, parameter_counts, sizes
from paretron.families.table import with_sizes
from paretron.plan.advice import RULES, Advice, advise
from paretron.plan.plan import make_plan
from paretron.plan.shapes import student_sizes, target_problems
from paretron.recipe import Student, load_recipe
from published import LLAMA, Published, config, recipe_text
from sparse import sparse_checkpoint

QWEN2 = config("qwen2", "Qwen2ForCausalLM", vocab=151936, hidden=3584, layers=28, heads=28,
               ffn=18944) | {"num_key_value_heads": 4}  # fmt: skip


def advice_on(
    student: dict[str, int], model: dict[str, Any] = LLAMA, *, on_gpu: bool = True
) -> list[Advice]:
    family = family_of(model)
    size = sizes(family, model)
    return list(advise(family, model, size, {"a": Student.model_validate(student)}, on_gpu=on_gpu))


# id -> the student, the rule that speaks, the axis, and the nearest better sizes
CASES: dict[str, tuple[dict[str, int], str, str, tuple[int, ...]]] = {
    "fp8": ({"ffn": 9217}, "tile.16", "ffn", (9216, 9344)),
    "tiles": ({"ffn": 9232}, "tile.64", "ffn", (9216, 9344)),
    "blocks": ({"ffn": 9280}, "tile.128", "ffn", (9216, 9344)),
    "hidden": ({"hidden": 3072 + 64}, "tile.128", "hidden", (3072, 3200)),
    "near-the-teacher": ({"ffn": 14335}, "tile.16", "ffn", (14208,)),
    "heads": ({"heads": 20, "kv_heads": 5}, "split.devices", "kv_heads", (4,)),
    "kv-heads": ({"kv_heads": 6}, "split.devices", "kv_heads", (4,)),
    "relabelled": ({"heads": 24}, "name.llama", "hidden", (4080,)),
}


@pytest.mark.parametrize("id", CASES)
def test_a_size_to_regret_and_the_nearest_better_ones(id: str) -> None:
    student, rule, axis, nearest = CASES[id]
    (found,) = [a for a in advice_on(student) if a.rule == rule and a.where.endswith(f".{axis}")]
    assert found.where == f"students.a.{axis}"
    assert tuple(found.nearest) == nearest
    assert found.level == ("note" if rule == "name.llama" else "advice")


@pytest.mark.parametrize("id", CASES)
def test_what_is_nearest_can_be_had_and_costs_what_is_said(id: str) -> None:
    student = CASES[id][0]
    family = family_of(LLAMA)
    teacher = sizes(family, LLAMA)

    def params(target: Student) -> int:
        size = student_sizes(teacher, target)
        return parameter_counts(family, with_sizes(family, LLAMA, size, kept_layers=None)).total

    for advice in advice_on(student):
        axis = advice.where.rpartition(".")[2]
        for n, added in advice.nearest.items():
            more = {"heads": n * 4} if axis == "kv_heads" else {}
            better = Student.model_validate({**student, **more, axis: n})
            assert params(better) - params(Student.model_validate(student)) == added
            problems = target_problems("a", teacher, better, family=family, config=LLAMA)
            assert problems == []


@pytest.mark.parametrize("student", [{"hidden": 3072, "ffn": 9216}, {"layers": 16}])
def test_the_published_students_are_fine(student: dict[str, int]) -> None:
    assert advice_on(student) == []


@pytest.mark.parametrize(
    ("change", "on_gpu", "rules"),
    [
        ({}, True, set()),
        ({"head_dim": 96}, False, {"gpu.head_dim"}),
        ({"head_dim": 72}, True, {"gpu.head_dim"}),
        ({"head_dim": 72}, False, {"gpu.head_dim", "vllm_cpu.head_dim"}),
        ({"vocab_size": 128257}, True, {"vocab.64"}),
    ],
)
def test_what_is_never_pruned_is_said_of_the_teacher(
    change: dict[str, int], on_gpu: bool, rules: set[str]
) -> None:
    found = advice_on({"layers": 16}, LLAMA | change, on_gpu=on_gpu)
    assert {a.rule for a in found} == rules
    assert all(a.where.startswith("teacher.") and not a.nearest for a in found)


def test_each_rule_was_seen_to_speak() -> None:
    seen = {a.rule for case in CASES.values() for a in advice_on(case[0])}
    seen |= {a.rule for a in advice_on({"layers": 16}, LLAMA | {"head_dim": 72}, on_gpu=False)}
    seen |= {a.rule for a in advice_on({"layers": 16}, LLAMA | {"vocab_size": 128257})}
    seen |= {a.rule for a in advice_on({"hidden": 3072}, QWEN2)}
    assert seen == {rule.id for rule in RULES}


@pytest.mark.parametrize("engines", ["", "profile: {engines: [{name: vllm}]}\n"])
def test_vllm_takes_another_head_dim_for_qwen2(engines: str, tmp_path: Path) -> None:
    """Advice, and a problem where vLLM is to be measured."""
    sparse_checkpoint(tmp_path / "teacher", QWEN2)
    shape = Published("", QWEN2, 0, 0, "{hidden: 3072}")
    (tmp_path / "recipe.yaml").write_text(recipe_text(shape) + engines)
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"), out=tmp_path / "out", offline=True)
    advice = [a for a in plan.advice if a.rule == "vllm.head_dim"]
    problems = [p for p in plan.problems if p.code is Code.UNSUPPORTED]
    assert len(problems) == bool(engines)
    assert len(advice) == (not engines)
    assert [a.where for a in advice] + [p.where for p in problems] == ["students.student.hidden"]
    # No hidden size below the teacher's has 28 heads of 128.
    assert all("vLLM (0.32)" in text for text in (*(a.finding for a in advice),
                                                  *(p.cause for p in problems)))  # fmt: skip


def test_fewer_heads_are_the_way_out_for_qwen2() -> None:
    rules = {a.rule for a in advice_on({"hidden": 3072, "heads": 24}, QWEN2)}
    assert "vllm.head_dim" not in rules
    (found,) = [a for a in advice_on({"hidden": 3000, "heads": 24}, QWEN2) if "vllm" in a.rule]
    assert tuple(found.nearest) == (3072,)


@pytest.mark.parametrize(
    ("change", "degrees"),
    [
        ({}, (1, 2, 4, 8, 16)),  # 16: each key-value head is kept twice
        ({"num_attention_heads": 24}, (1, 2, 4, 8)),
        ({"num_key_value_heads": 2}, (1, 2, 4, 8, 16)),
        ({"num_key_value_heads": 32, "num_attention_heads": 96}, (1, 2, 4, 8, 16)),
        ({"num_key_value_heads": 12, "num_attention_heads": 96}, (1, 2, 4)),
        ({"intermediate_size": 14332}, (1, 2, 4)),
        ({"vocab_size": 128257}, (1,)),
    ],
)
def test_over_how_many_devices(change: dict[str, int], degrees: tuple[int, ...]) -> None:
    model = LLAMA | change
    family = FAMILIES["llama"]
    assert tensor_parallel_degrees(family, sizes(family, model)) == degrees
    by_engine = {s.engine: s for s in served_by(model)}
    assert by_engine["vllm"].tensor_parallel == degrees
    assert by_engine["vllm"].loads == "yes"


def test_who_takes_what_no_class_does() -> None:
    odd = LLAMA | {"hidden_size": 4095, "attention_bias": True}
    assert {s.loads for s in served_by(odd)} == {"no"}
    assert {s.loads for s in served_by(odd | {"attention_bias": False})} == {"yes", "untried"}
    narrow = {s.engine: s for s in served_by(QWEN2 | {"hidden_size": 3072})}
    assert (narrow["vllm"].loads, narrow["transformers"].loads) == ("no", "yes")
