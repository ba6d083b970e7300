"""What planning refuses of trainings that are cut, compiled or attend by another library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code
from paretron.plan.cost import model_facts
from paretron.plan.estimate import estimate_stages
from paretron.plan.hardware import Hardware
from paretron.plan.parallel import parallel_problems
from paretron.plan.stages import stages_of
from paretron.recipe import Recipe, devices
from pico import pico_model
from picorun import RECIPE

HALF: dict[str, Any] = {"dtype": "bfloat16", "attention": "flash_attention_2"}


def problems(
    family: str = "llama", student: dict[str, Any] | None = None, **changes: Any
) -> dict[str, tuple[Code, str]]:
    """Where -> code and cause; `changes` are those of `distill`."""
    data = RECIPE["data"]
    if changes.pop("apart", False):
        data = data | {"train": data["train"] | {"documents": "apart"}}
    recipe = Recipe.model_validate(
        RECIPE | {"data": data, "distill": RECIPE["distill"] | changes, "correct": None}
    )
    config = pico_model(family).config.to_dict()
    facts = model_facts(config | (student or {}), dtype="F32")
    found = parallel_problems(recipe, config, {"width": facts})
    return {str(p.where): (p.code, p.cause) for p in found}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were installed; nothing here calls it."""
    monkeypatch.setattr(devices, "find_spec", lambda name: object())


def test_a_student_that_does_not_divide_is_refused_where_its_teacher_does() -> None:
    two: dict[str, Any] = {"processes": 2, "tensor_parallel": 2}
    assert not problems(**two)
    code, cause = problems(student={"intermediate_size": 63}, **two)["distill.tensor_parallel"]
    assert code is Code.RECIPE_VALUE
    assert cause == "63 MLP neurons (ffn) do not divide over 2 processes"
    code, _ = problems("phi3", **two)["distill.tensor_parallel"]
    assert code is Code.UNSUPPORTED


def test_flash_attention_that_is_absent_is_named_with_what_installs_it() -> None:
    code, cause = problems(**HALF)["distill.attention"]
    assert (code, code.exit) == (Code.OPTIONAL_MISSING, 6)
    assert "flash-attn" in cause
    assert not problems(dtype="bfloat16")


def test_flash_attention_keeps_no_documents_apart_in_several_windows(flash: None) -> None:
    assert not problems(**HALF)
    assert not problems(**HALF, apart=True, micro_batch=1)
    code, cause = problems(**HALF, apart=True)["distill.attention"]
    assert code is Code.UNSUPPORTED
    assert "one window at a time" in cause
    phases = [{"seq_len": 32, "tokens": 768, "micro_batch": 1}]
    assert not problems(**HALF, apart=True, phases=phases)


def test_attention_with_a_cap_stays_with_what_has_it(flash: None) -> None:
    code, cause = problems("gemma2", **HALF)["distill.attention"]
    assert code is Code.UNSUPPORTED
    assert "caps" in cause
    assert not problems("gemma3_text", **HALF)


def test_a_compiler_is_asked_for_where_layers_are_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert problems(compile=True)["distill.compile"][0] is Code.OPTIONAL_MISSING
    assert not problems(compile=False)
    (tmp_path / "clang++").touch(mode=0o755)
    assert not problems(compile=True)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"attention": "flash_attention_2"}, "goes with bfloat16"),
        ({"processes": 3, "global_batch": 6, "tensor_parallel": 2}, "is not a multiple of tensor"),
        ({"processes": 4, "tensor_parallel": 2, "micro_batch": 4}, "/ tensor_parallel 2"),
        ({"processes": 2, "tensor_parallel": 2, "compile": True}, "compile goes without"),
        ({"processes": 2, "tensor_parallel": 2, "teacher": "offloaded"}, "replicated or sharded"),
        ({"processes": 2, "tensor_parallel": 2, "loss": {"top_k": 4}}, "every token's logit"),
        (
            {"processes": 2, "tensor_parallel": 2, "loss": {"states": {"attention": [[0, 0]]}}},
            "has all heads",
        ),
        ({"compile": True, "loss": {"states": {"mlp_input": [[0, 0]]}}}, "compile goes without"),
    ],
)
def test_switches_that_exclude_each_other(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(RECIPE | {"distill": RECIPE["distill"] | stated})


def test_a_group_of_processes_counts_as_one_where_batches_divide() -> None:
    stated = {"processes": 4, "tensor_parallel": 4, "micro_batch": 4}
    Recipe.model_validate(RECIPE | {"distill": RECIPE["distill"] | stated})


def test_adapters_are_not_cut() -> None:
    correct = RECIPE["correct"] | {"processes": 2, "tensor_parallel": 2, "micro_batch": 2}
    Recipe.model_validate(RECIPE | {"correct": correct})
    with pytest.raises(ValueError, match="lora goes without tensor_parallel"):
        Recipe.model_validate(RECIPE | {"correct": correct | {"what": "lora"}})


def test_a_teacher_that_is_cut_takes_its_share_of_a_device() -> None:
    facts = model_facts(pico_model("llama").config.to_dict(), dtype="F32")
    needed = {}
    for degree in (1, 2):
        distill = RECIPE["distill"] | {"processes": 2, "tensor_parallel": degree}
        recipe = Recipe.model_validate(RECIPE | {"distill": distill})
        estimates = estimate_stages(
            stages_of(recipe, block_sizes=(), engine_formats=frozenset()),
            recipe,
            facts,
            {"width": facts, "depth": facts},
            Hardware("a GPU", 1e14, 80 << 30, "stated", is_gpu=True),
            candidates={},
            corrected_weights=0,
            compensations={},
        )
        needed[degree] = estimates["width.distill"].memory_bytes
    assert needed[1] - needed[2] == facts.weight_bytes // 2
