"""Students with fewer or narrower experts: what can be had, what it costs, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from makers import PicoMaker
from paretron.artifacts.reader import Checkpoint
from paretron.cli.main import _run
from paretron.errors import Code, Problem
from paretron.families import FAMILIES, sizes
from paretron.families.table import with_sizes
from paretron.plan.cost import model_facts
from paretron.plan.shapes import student_sizes, target_problems
from paretron.recipe import Student
from picoscores import random_scores

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
LLAMA = {k: v for k, v in MIXTRAL.items() if "experts" not in k} | {"model_type": "llama"}
QWEN3_MOE = MIXTRAL | {
    "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 768, "head_dim": 128,
}  # fmt: skip


def _problems(config: dict[str, Any], **target: Any) -> list[Problem]:
    family = FAMILIES[config["model_type"]]
    have = sizes(family, config)
    return target_problems("s", have, Student(**target), family=family, config=config)


def test_experts_and_their_width_are_axes_of_a_student() -> None:
    assert not _problems(MIXTRAL, experts=4, moe_ffn=7168, hidden=3072)
    size = student_sizes(sizes(FAMILIES["mixtral"], MIXTRAL), Student(experts=4, moe_ffn=7168))
    assert (size["experts"], size["moe_ffn"], size["hidden"]) == (4, 7168, 4096)


def test_half_the_experts_cost_a_token_the_same() -> None:
    teacher = model_facts(MIXTRAL, dtype="BF16")
    family = FAMILIES["mixtral"]
    config = with_sizes(family, MIXTRAL, {**teacher.sizes, "experts": 4}, kept_layers=None)
    student = model_facts(config, dtype="BF16")
    routers = 32 * 4096 * 4  # rows of the router for the experts that went
    assert student.active_params == teacher.active_params - routers
    assert student.forward_flops_per_token == teacher.forward_flops_per_token - 2 * routers
    assert student.params == teacher.params - routers - 32 * 4 * 3 * 4096 * 14336


@pytest.mark.parametrize(
    ("config", "target", "where", "fix"),
    [
        (MIXTRAL, {"experts": 1}, "students.s.experts", "at least 2"),
        (MIXTRAL, {"experts": 9}, "students.s.experts", "at most 8"),
        (MIXTRAL, {"moe_ffn": 7001}, "students.s.moe_ffn", "nearest: 7000 or 7008"),
        (MIXTRAL, {"moe_ffn": 3}, "students.s.moe_ffn", "nearest: 8"),
        (MIXTRAL, {"hidden": 3075}, "students.s.hidden", "nearest: 3072 or 3080"),
        (MIXTRAL, {"experts": 8}, "students.s", "a smaller axis"),
        (MIXTRAL, {"ffn": 64}, "students.s.ffn", "leave it out"),
        (LLAMA, {"experts": 4}, "students.s.experts", "leave it out"),
        (LLAMA, {"moe_ffn": 4, "hidden": 2048}, "students.s.moe_ffn", "leave it out"),
        (QWEN3_MOE, {"ffn": 64}, "students.s.ffn", "leave it out"),
    ],
)
def test_what_cannot_be_had(
    config: dict[str, Any], target: dict[str, int], where: str, fix: str
) -> None:
    (problem,) = _problems(config, **target)
    assert problem.code is Code.RECIPE_TARGET
    assert problem.where == where
    assert fix in problem.fix


def test_the_mlp_of_layers_without_experts_is_an_axis_where_there_are_some() -> None:
    assert not _problems(QWEN3_MOE | {"mlp_only_layers": [0]}, ffn=4096)


def test_inspect_and_prune_know_experts(
    pico: PicoMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico("qwen3_moe")
    assert _run(["inspect", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = Checkpoint.open(model).config
    assert found["active_params"] == model_facts(config, dtype="F32").active_params
    assert found["active_params"] == found["params"] - 3 * 2 * 3 * 64 * 48
    assert {"experts", "moe_ffn", "ffn"} <= found["prunable"].keys()
    scores = model.parent / "scores"
    scores.mkdir()
    random_scores(Checkpoint.open(model)).save(scores)
    out = model.parent / "out"
    sizes_wanted = ["--experts", "3", "--moe-ffn", "32"]
    assert _run(["prune", str(model), "--scores", str(scores), "--out", str(out), *sizes_wanted,
                 "-q"]) == 0  # fmt: skip
    size = sizes(FAMILIES["qwen3_moe"], Checkpoint.open(out).config)
    assert (size["experts"], size["moe_ffn"]) == (3, 32)
