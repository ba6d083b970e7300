"""Tasks in a run: planned, asked by its evaluations, kept when one is stopped."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from makers import PicoMaker
from paretron.data import harness
from paretron.data.answers import Judged
from paretron.errors import Code, ParetronError
from paretron.plan.plan import Plan, make_plan
from paretron.plan.stages import stages_of
from paretron.recipe import Correct, Recipe, load_recipe, resolve_recipe
from paretron.run.check import twin_recipe
from paretron.run.runner import run_plan
from paretron.run.stages import STAGES
from picorun import RECIPE, events, write_pico_recipe
from picotask import TASK


@pytest.fixture
def recipe(pico: PicoMaker, tmp_path: Path) -> Callable[..., Recipe]:
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 40)
    teacher = pico(num_hidden_layers=2)

    def made(**evaluate: Any) -> Recipe:
        text = {"path": "a.txt", "seq_len": 16}
        raw = {
            "schema": 1,
            "teacher": {"model": str(teacher)},
            "data": {"calibration": text, "train": text, "validation": text},
            "students": {"small": {"layers": 1}},
            "distill": {"tokens": 1280, "global_batch": 4},
            "evaluate": evaluate,
        }
        return resolve_recipe(raw, where="recipe.yaml", base=tmp_path)

    return made


def planned(recipe: Recipe, folder: Path) -> Plan:
    return make_plan(recipe, out=folder / "run", offline=True)


def run_evaluation(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The teacher's evaluation alone, with what it needs."""
    plan = planned(recipe, folder)
    wanted = ("teacher", "data", "teacher.evaluate-final")
    some = replace(plan, stages=tuple(s for s in plan.stages if s.name in wanted))
    run_plan(some, folder / "run", stages=STAGES, offline=True)
    written = (folder / "run/stages/teacher.evaluate-final/evaluation.json").read_text()
    found: dict[str, Any] = json.loads(written)
    return found


def test_a_plan_tells_what_is_left_out_and_refuses_what_cannot_be_asked(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    plan = planned(recipe(suite="minitron-base"), tmp_path)
    assert plan.problems == ()
    told = [note for note in plan.notices if note.startswith("evaluate.suite: ")]
    assert [note.split()[1] for note in told] == ["xlsum_english", "humaneval", "mbpp"]
    plan = planned(recipe(tasks=["winogrand", "humaneval"]), tmp_path)
    assert [(p.code, p.where) for p in plan.problems] == [
        (Code.RECIPE_VALUE, "evaluate.tasks: winogrand"),
        (Code.UNSUPPORTED, "evaluate.tasks: humaneval"),
    ]


def test_a_goal_for_a_task_that_nobody_asks_is_a_problem_of_the_plan(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    given = recipe(tasks=[str(TASK), "mmlu"])
    for name, wrong in (("agreement", False), ("mmlu_anatomy", False), ("agrement", True)):
        goals = {f"task.{name}": ">= -3"}
        plan = planned(given.model_copy(update={"goals": goals}), tmp_path)
        found = [(p.code, p.where, p.fix) for p in plan.problems]
        problem = (Code.RECIPE_VALUE, f"goals.task.{name}", "one of agreement, mmlu")
        assert found == ([problem] if wrong else [])


def test_a_plan_without_lm_eval_names_what_to_install(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (problem,) = planned(recipe(tasks=["piqa"]), tmp_path).problems
    assert problem.code is Code.OPTIONAL_MISSING
    assert problem.fix == 'pip install "paretron[eval]"'
    assert planned(recipe(), tmp_path).problems == ()  # texts alone need none


def test_a_rehearsal_asks_two_documents_of_what_can_be_asked(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    given = recipe(tasks=[{"task": str(TASK), "few_shot": 1}], suite="minitron-base")
    twin = twin_recipe(given, folder=tmp_path, offline=True)
    assert {t.limit for t in twin.evaluate.asked} == {2}
    assert [t.task for t in twin.evaluate.asked][-1] == str(TASK)
    assert len(twin.evaluate.asked) == 7  # without three of the suite's nine
    assert planned(twin, tmp_path).problems == ()


def test_tasks_are_for_the_models_that_somebody_may_take(recipe: Callable[..., Recipe]) -> None:
    def settings(recipe: Recipe, **correct: Any) -> dict[str, dict[str, Any]]:
        section = Correct.model_validate({"tokens": 640, "global_batch": 4} | correct)
        stages = stages_of(
            recipe.model_copy(update={"correct": section}),
            block_sizes=(1,),
            engine_formats=frozenset(),
        )
        return {s.name: dict(s.settings) for s in stages if s.kind == "evaluate"}

    for correct in ({}, {"mode": "parallel"}):
        texts = settings(recipe(), **correct)
        found = settings(recipe(tasks=[str(TASK)], suite="minitron-base", run_code=True), **correct)
        assert len(found) == 4
        final = {name for name in found if name.endswith("-final")}
        assert final == {"teacher.evaluate-final", "small.evaluate-final"}
        # So that naming a task, or allowing code, makes none of the others again.
        assert {n: s for n, s in found.items() if n not in final} == {
            n: s for n, s in texts.items() if n not in final
        }
        assert all(len(found[name]["evaluate"]["tasks"]) == 1 for name in final)


@pytest.mark.usefixtures("own_cache")
def test_a_run_may_be_judged_by_tasks_alone(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    given = write_pico_recipe(
        tmp_path,
        correct=None,
        students={"small": {"layers": 2}},
        distill=RECIPE["distill"] | {"tokens": 128},
        evaluate={"perplexity": [], "tasks": [{"task": str(TASK), "limit": 8}]},
        goals={"task.agreement": ">= -100", "params": "<= 2x"},
        export=[{"to": "hf"}],
        profile=None,
    )
    plan = planned(load_recipe(given), tmp_path)
    folder = run_plan(plan, tmp_path / "run", stages=STAGES, offline=True)
    report = json.loads((folder / "report.json").read_text())
    teacher, small = report["models"]
    assert teacher["tasks"]["agreement"]["samples"] == 8
    assert small["loss"] == {"pruned": None, "final": None}
    apart = small["differences"]["task.agreement"]
    assert apart["value"] == pytest.approx(
        small["tasks"]["agreement"]["value"] - teacher["tasks"]["agreement"]["value"]
    )
    assert [g["verdict"] for g in report["goals"]] == ["met", "met"]
    asked = {e["stage"] for e in events(tmp_path / "run") if e["kind"] == "task"}
    assert asked == {"teacher.evaluate-final", "small.evaluate-final"}


@pytest.mark.usefixtures("own_cache")
def test_a_stopped_stage_goes_on_and_a_finished_one_is_known_by_its_documents(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an extra")
    for name in ("one", "two"):
        text = TASK.read_text().replace("agreement", name)
        (tmp_path / f"{name}.yaml").write_text(text)
        shutil.copy(TASK.with_suffix(".jsonl"), tmp_path / f"{name}.jsonl")
    given = recipe(tasks=["one.yaml", {"task": "two.yaml", "limit": 10}])
    judge = harness.judge

    def stopping(name: str, *arguments: Any, **more: Any) -> Judged:
        if name == "two":
            raise KeyboardInterrupt
        return judge(name, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(ParetronError) as stopped:
        patch.setattr(harness, "judge", stopping)
        run_evaluation(given, tmp_path)
    assert stopped.value.problems[0].code is Code.INTERRUPTED
    found = run_evaluation(given, tmp_path)
    assert {name: score["samples"] for name, score in found["tasks"].items()} == {
        "one": 72, "two": 10,
    }  # fmt: skip
    assert found["texts"]["validation"]["tokens"] > 0
    told = [(e["task"], e["reused"]) for e in events(tmp_path / "run") if e["kind"] == "task"]
    assert told == [("one", False), ("one", True), ("two", False)]
    run_evaluation(given, tmp_path)
    assert [e["kind"] for e in events(tmp_path / "run")][-1] == "reused"
    documents = tmp_path / "two.jsonl"
    documents.write_text(documents.read_text().replace("here", "there"))
    with pytest.raises(ParetronError) as caught:
        run_evaluation(given, tmp_path)
    (problem,) = caught.value.problems
    assert problem.code is Code.RUN_MISMATCH
    assert "content: lm-eval " in problem.cause
