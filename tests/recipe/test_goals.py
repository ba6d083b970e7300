"""Goals are read strictly, and one that nothing could judge is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretron.errors import Code, ParetronError
from paretron.plan.stages import REPORT, stages_of
from paretron.recipe import Recipe, load_recipe
from paretron.recipe.goals import SPEEDS, Place, parse_goals
from paretron_profiling.schema import FIGURES
from picorun import RECIPE

SERVED = {
    "engines": [{"name": "vllm_server"}, {"name": "ortgenai"}],
    "batches": [1, 8],
    "concurrency": [16],
    "rates": [0.5],
    "lengths": [[128, 128], [64, 8]],
}


def recipe(goals: Any, **changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | {"goals": goals} | changes)


def test_every_measured_speed_can_be_a_goal() -> None:
    assert set(SPEEDS) == set(FIGURES) - {"sm_clock_mhz"}  # which nobody wants for itself


@pytest.mark.parametrize(
    ("text", "at_least", "bound", "kind"),
    [
        (">= 1.8x", True, 1.8, "ratio"),
        ("<= 200", False, 200.0, "absolute"),
        (">= -3", True, -3.0, "difference"),
        ("<= +0.05", False, 0.05, "difference"),
        ("<=1e3", False, 1000.0, "absolute"),
        (" >=  2. ", True, 2.0, "absolute"),
        (">= +0", True, 0.0, "difference"),
    ],
)
def test_a_bound(text: str, at_least: bool, bound: float, kind: str) -> None:
    (goal,) = parse_goals({"ttft_ms": text})
    assert (goal.at_least, goal.bound, goal.kind) == (at_least, bound, kind)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("ttft_ms", Place()),
        ("ttft_ms@vllm", Place("vllm")),
        ("ttft_ms@batch:8", Place(load=("batch", 8))),
        ("ttft_ms@rate:0.5", Place(load=("rate", 0.5))),
        ("ttft_ms@64x8", Place(lengths=(64, 8))),
        ("ttft_ms@same_memory/64x8", Place(same_memory=True, lengths=(64, 8))),
        ("ttft_ms@a-b/concurrency:16/64x8", Place("a-b", ("concurrency", 16), lengths=(64, 8))),
    ],
)
def test_a_workload(key: str, place: Place) -> None:
    (goal,) = parse_goals({key: "<= 1"})
    assert goal.place == place


WRONG = {
    "unknown": ("ttft", "<= 1", "allowed: output_tok_s"),
    "size-with-workload": ("params@vllm", "<= 1", "allowed:"),
    "nothing-after": ("ttft_ms@", "<= 1", "nothing stands after @"),
    "order": ("ttft_ms@64x8/vllm", "<= 1", "'vllm' is no part of a workload"),
    "twice": ("ttft_ms@vllm/ortgenai", "<= 1", "'ortgenai' is no part of a workload"),
    "load-and-memory": ("ttft_ms@same_memory/batch:8", "<= 1", "is no part of a workload"),
    "load-without-word": ("ttft_ms@vllm/8", "<= 1", "concurrency:16"),
    "no-comparison": ("ttft_ms", "200", "is no bound"),
    "strictly": ("ttft_ms", "< 200", "is no bound"),
    "nan": ("ttft_ms", "<= nan", "is no bound"),
    "infinite": ("ttft_ms", "<= inf", "is no bound"),
    "two-kinds": ("ttft_ms", "<= +1.5x", "a ratio and a difference"),
    "zero-times": ("ttft_ms", "<= 0x", "state a ratio above 0"),
    "loss-ratio": ("loss.validation", "<= 1.1x", "by their difference"),
    "perplexity-difference": ("perplexity.validation", "<= +1", "by their ratio"),
    "task-ratio": ("task.mmlu", ">= 0.9x", "by their difference"),
    "task-fraction": ("task.mmlu", ">= 0.6", "tasks are in percent: 60, not 0.6"),
    "text": ("loss.test", "<= 1", "no text of a recipe"),
    "task-name": ("task.", "<= 2", "no figure"),
    "escape": ("task.\x1b[2J", "<= 2", "no figure"),
    "number": ("ttft_ms", 200, "'<= 200' or '>= 200'"),
    "nothing": ("ttft_ms", None, "valid string"),
}


@pytest.mark.parametrize("id", WRONG)
def test_a_goal_that_is_none_is_refused(id: str) -> None:
    key, bound, said = WRONG[id]
    with pytest.raises(ValueError, match="validation error") as caught:
        recipe({key: bound})
    assert said in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("goals: {ttft: '<= 1', tpot_ms: '5', params: '<= 0.5x'}\n")
    with pytest.raises(ParetronError) as caught:
        load_recipe(path)
    (problem,) = [p for p in caught.value.problems if p.where.endswith(": goals")]
    assert problem.code is Code.RECIPE_VALUE
    assert "ttft: " in problem.cause
    assert "tpot_ms: " in problem.cause
    assert "params" not in problem.cause.replace("params, non_embedding_params", "")


def test_nested_keys_are_dotted_ones() -> None:
    goals = {"loss": {"validation": "<= 3"}, "task": {"a.b": ">= 60"}}
    nested = recipe(goals, evaluate={"tasks": ["a.b"]})
    assert nested.goals == {"loss.validation": "<= 3", "task.a.b": ">= 60"}
    with pytest.raises(ValueError, match=r"loss\.validation stands twice"):
        recipe({"loss": {"validation": "<= 3"}, "loss.validation": "<= 3"})


def test_an_override_states_a_goal(tmp_path: Path) -> None:
    import json

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE))
    loaded = load_recipe(path, overrides=["goals.loss.validation=<= +0.05", "goals.params=<= 0.5x"])
    assert loaded.goals == {"loss.validation": "<= +0.05", "params": "<= 0.5x"}


UNMEASURED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no-profile": ({"ttft_ms": "<= 1"}, {"profile": None}, "without a `profile` section"),
    "engine": ({"ttft_ms@vllm": "<= 1"}, {"profile": SERVED}, "profile.engines has no vllm: "),
    "batch": ({"ttft_ms@batch:2": "<= 1"}, {"profile": SERVED}, "profile.batches has no 2"),
    "rate": ({"ttft_ms@rate:2": "<= 1"}, {"profile": SERVED}, "profile.rates has no 2"),
    "lengths": ({"ttft_ms@8x64": "<= 1"}, {"profile": SERVED}, "profile.lengths has no [8, 64]"),
    "text": ({"loss.train": "<= 1"}, {}, "evaluate.perplexity does not name train"),
    "task": ({"task.mmlu": ">= 60"}, {}, "evaluate names no tasks and no suite"),
}  # fmt: skip


@pytest.mark.parametrize("id", UNMEASURED)
def test_what_the_recipe_does_not_measure_is_said_before_any_work(id: str) -> None:
    goals, changes, said = UNMEASURED[id]
    with pytest.raises(ValueError, match="validation error") as caught:
        recipe(goals, **changes)
    assert said in str(caught.value)


def test_what_it_measures_is_taken() -> None:
    goals = {
        "ttft_ms@vllm_server/concurrency:16/128x128": "<= 200",
        "e2e_ms@rate:0.5": "<= 1e3",
        "output_tok_s@same_memory": ">= 2x",
        "output_tok_s@ortgenai/batch:8/64x8": ">= 2x",
    }
    assert recipe(goals, profile=SERVED).goals == goals


def test_goals_change_no_stage_but_the_report() -> None:
    def stages(made: Recipe) -> dict[str, Any]:
        found = stages_of(made, block_sizes=(), engine_formats=frozenset({"onnx"}))
        return {stage.name: stage for stage in found}

    without, with_goals = stages(recipe({})), stages(recipe({"params": "<= 0.5x"}))
    assert {n for n in without if without[n] != with_goals[n]} == {REPORT}
    assert with_goals[REPORT].settings == {"goals": {"params": "<= 0.5x"}}
